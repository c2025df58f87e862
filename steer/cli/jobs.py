"""`steer jobs`: the jobs of a running server."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit.saving import file_errors
from steer.cli.reporting import FAILED, err, out, table_out
from steer.cli.serve import read_key
from steer.cli.steering import read_json
from steer.errors import SteerError

if TYPE_CHECKING:
    import httpx

app = typer.Typer(
    help="Ask for, follow and cancel the jobs of a running server.", no_args_is_help=True
)

UrlOption = Annotated[str, typer.Option("--url", "-u", help="Where the server is.")]
KeyOption = Annotated[
    Path | None, typer.Option("--api-key-file", help="A file that holds the server's API key.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
JobArgument = Annotated[str, typer.Argument(help="The job's id.")]
DEFAULT_URL = "http://127.0.0.1:8000"


@app.command("submit")
def submit(
    kind: Annotated[
        str,
        typer.Argument(help="fit, fit/labels or another, sweep, calibrate, evaluate or import."),
    ],
    params: Annotated[Path, typer.Argument(help="JSON: the body of POST /v1/steering/KIND.")],
    data: Annotated[
        Path | None, typer.Option(help="A file of JSON lines that goes into the field 'data'.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Follow the job to its end.")] = False,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
) -> None:
    """Ask for a job."""
    given = read_json(params)
    if not isinstance(given, dict):
        raise SteerError(
            f"{str(params)!r} does not hold the parameters of a job: they are a JSON object, the "
            f"body of POST /v1/steering/{kind}",
            code="invalid_json",
        )
    body = dict(given)
    if data is not None:
        try:
            body["data"] = data.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise SteerError(
                f"the data {str(data)!r} cannot be read: {error}", code="no_such_file"
            ) from None
    with _server(url, api_key_file) as server:
        job = _answer(server.post(f"/v1/steering/{kind}", json=body))
        if watch:
            _finish(_watch(server, job["id"]))
            return
    out().print(job["id"], highlight=False)


@app.command("list")
def list_jobs(
    kind: Annotated[str | None, typer.Option(help="Only jobs of this kind.")] = None,
    state: Annotated[str | None, typer.Option(help="Such as running or failed.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="At most so many.")] = 20,
    as_json: JsonOption = False,
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
) -> None:
    """List jobs, the newest first."""
    wanted = {"kind": kind, "state": state, "limit": limit}
    query = {name: value for name, value in wanted.items() if value is not None}
    with _server(url, api_key_file) as server:
        jobs = _answer(server.get("/v1/jobs", params=query))["data"]
    if as_json:
        typer.echo(json.dumps(jobs, indent=2, ensure_ascii=False))
        return
    from rich.table import Table
    from rich.text import Text

    table = Table()
    for heading in ("job", "kind", "state", "progress", "created"):
        table.add_column(heading)
    for job in jobs:
        cells = (job["id"], job["kind"], job["state"], _far(job), job["created_at"][:19])
        table.add_row(*(Text(cell) for cell in cells))
    table_out().print(table)


@app.command("show")
def show(job_id: JobArgument, url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None) -> None:
    """Print a job as JSON."""
    with _server(url, api_key_file) as server:
        job = _answer(server.get(f"/v1/jobs/{_part(job_id)}"))
    typer.echo(json.dumps(job, indent=2, ensure_ascii=False))


@app.command("watch")
def watch(
    job_id: JobArgument, url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None
) -> None:
    """Follow a job to its end and print its result; the exit code is 2 where it has none."""
    with _server(url, api_key_file) as server:
        _finish(_watch(server, _part(job_id)))


@app.command("cancel")
def cancel(
    job_id: JobArgument, url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None
) -> None:
    """Cancel a job."""
    with _server(url, api_key_file) as server:
        job = _answer(server.post(f"/v1/jobs/{_part(job_id)}/cancel"))
    word = "cancelling" if job["cancelling"] else job["state"]
    out().print(f"{word} {job['id']}", highlight=False)


@app.command("fetch")
def fetch(
    job_id: JobArgument,
    folder: Annotated[Path, typer.Argument(help="Where to put them.")],
    url: UrlOption = DEFAULT_URL,
    api_key_file: KeyOption = None,
) -> None:
    """Fetch the files that a job has made; those that are here already are not fetched again."""
    from steer.fit.bulk.shards import missing_shards

    place = f"/v1/jobs/{_part(job_id)}/files"
    with _server(url, api_key_file) as server:
        names = [one["name"] for one in _answer(server.get(place))["data"]]
        if not names:
            raise SteerError(
                f"{job_id} has no files here: it made none, failed, or ran on another machine",
                code="unknown_file",
            )
        # The card of a capture comes first, and says what of the rest is here.
        cards = [one for one in names if one.endswith(".json")]
        for name in cards:
            _fetch(server, f"{place}/{_part(name)}", folder, Path(name).name)
        for name in sorted(missing_shards(folder, names) - set(cards)):
            _fetch(server, f"{place}/{_part(name)}", folder, Path(name).name)
    out().print(f"wrote {folder}: {len(names)} files", highlight=False)


def _fetch(server: httpx.Client, place: str, folder: Path, name: str) -> None:
    """Writes one file, which appears whole or not at all."""
    part = folder / f"{name}.part"
    with file_errors(part):
        folder.mkdir(parents=True, exist_ok=True)
        with server.stream("GET", place) as response, part.open("wb") as file:
            if not response.is_success:
                response.read()
                _answer(response)
            for data in response.iter_bytes():
                file.write(data)
        part.replace(folder / name)


@app.command("delete")
def delete(
    job_id: JobArgument, url: UrlOption = DEFAULT_URL, api_key_file: KeyOption = None
) -> None:
    """Forget a finished job."""
    with _server(url, api_key_file) as server:
        _answer(server.delete(f"/v1/jobs/{_part(job_id)}"))
    out().print(f"deleted {job_id}", highlight=False)


@contextmanager
def _server(url: str, key_file: Path | None) -> Iterator[httpx.Client]:
    """A client of the server; raises `SteerError` where it cannot be reached."""
    import httpx

    key = read_key(key_file)
    headers = {} if key is None else {"authorization": f"Bearer {key}"}
    try:
        with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
            yield client
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise SteerError(
            f"the server {url!r} cannot be reached: {error or type(error).__name__}; start one "
            "with 'steer serve', or say where it is with --url",
            code="no_server",
        ) from None


def _answer(response: httpx.Response) -> dict[str, Any]:
    """The body; raises the server's error."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if response.is_success and isinstance(body, dict):
        return body
    error = body.get("error") if isinstance(body, dict) else None
    if isinstance(error, dict) and "message" in error:
        raise _failure(error)
    raise SteerError(
        f"{str(response.url)!r} answers {response.status_code}, and not as Steer does: check --url",
        code="no_server",
    )


def _failure(error: Mapping[str, Any]) -> SteerError:
    return SteerError(error["message"], code=error.get("code"), param=error.get("param"))


def _watch(server: httpx.Client, job_id: str) -> dict[str, Any]:
    """Shows the progress on stderr until the job has ended; the job. A connection that breaks is
    taken up where it was."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as progress:
        task = progress.add_task(job_id, total=None)
        for event, data in _events(server, job_id):
            if event == "end":
                return data
            if event == "error":
                raise _failure(data["error"])
            happened = data["data"]
            if event == "progress":
                label = happened["note"] or job_id
                progress.update(
                    task,
                    description=label,
                    completed=happened["done"],
                    total=happened["total"],
                )
            else:
                progress.update(task, description=f"{job_id}: {happened['state']}")
    raise AssertionError("a job's events end with the job")


def _events(server: httpx.Client, job_id: str) -> Iterator[tuple[str, dict[str, Any]]]:
    import httpx

    last, refused = "0", 0
    while True:
        try:
            with server.stream(
                "GET", f"/v1/jobs/{job_id}/events", headers={"last-event-id": last}
            ) as response:
                if response.status_code == 204:
                    yield "end", _answer(server.get(f"/v1/jobs/{job_id}"))
                    return
                if not response.is_success:
                    response.read()
                    _answer(response)
                for fields in _blocks(response.iter_lines()):
                    refused = 0
                    last = fields.get("id", last)
                    yield fields["event"], json.loads(fields["data"])
                    if fields["event"] in ("end", "error"):
                        return
        except httpx.TransportError:
            refused += 1
            if refused > 3:
                raise


def _blocks(lines: Iterator[str]) -> Iterator[dict[str, str]]:
    """The fields of each server-sent event; comments are left out."""
    fields: dict[str, str] = {}
    for line in lines:
        if not line and "data" in fields:
            yield fields
            fields = {}
        elif line and not line.startswith(":"):
            name, _, value = line.partition(":")
            fields[name] = value.removeprefix(" ")


def _finish(job: Mapping[str, Any]) -> None:
    """Prints the result; ends the command with an error where there is none."""
    if job["state"] == "succeeded":
        typer.echo(json.dumps(job["result"], indent=2, ensure_ascii=False))
        return
    if job["error"] is not None:
        raise _failure(job["error"])
    err().print(f"the job was {job['state']}", highlight=False)
    raise typer.Exit(FAILED)


def _far(job: Mapping[str, Any]) -> str:
    progress = job["progress"]
    if progress["total"] is None:
        return str(progress["done"]) if progress["done"] else ""
    return f"{progress['done']}/{progress['total']} {progress['note']}".strip()


def _part(job_id: str) -> str:
    """The id as one part of a path."""
    from urllib.parse import quote

    return quote(job_id, safe="")
