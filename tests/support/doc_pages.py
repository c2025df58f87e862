"""Pages of documentation whose code is run: `python tests/support/doc_pages.py --update PAGE...`.

A page is a session: its ```python blocks share one namespace, its ```bash blocks run in the same
folder with the same registry, and the demo model, or the one that the page tells `make serve` of,
is served at the address that the page names. The
```text block that follows a block at once is what it prints. A block that cannot run here has a
comment in front of it that readers do not see, `<!-- not run: REASON -->`, and code of another
package `<!-- run with: ENVIRONMENT -->`: it runs alone, by that environment of `make oracles` or
`make clients`.

`--update` runs the pages and writes what was printed, and the pictures that were drawn, into them.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

import torch
import typer
from live_server import live_server
from liveness import LIVENESS_SECONDS

from steer.engines.transformers.checkpoints.known import DEMO

ROOT = Path(__file__).resolve().parents[2]
ADDRESS = "http://127.0.0.1:8000"
RUN = ("python", "bash")

_FENCE = re.compile(
    r"(?:<!-- (?:not run: (?P<reason>[^>]*?)|run with: (?P<peer>[\w-]+)) -->\n+)?"
    r"^```(?P<language>\w+)[^\n]*\n(?P<code>.*?)^```$",
    re.DOTALL | re.MULTILINE,
)
_PICTURE = re.compile(r"\((?:\.\./)*(?:docs/)?images/(tutorial-[\w-]+\.png)\)")
_SERVED = re.compile(r"^make serve MODEL=(\w+)$", re.MULTILINE)
_DECIMAL = re.compile(r"-?\d+\.\d+")
_HASH = re.compile(r"@[0-9a-f]{12}\b")


class PageFailed(Exception):
    """A block of a page could not be run: the page, the line, and what it said."""


@dataclass(frozen=True)
class Block:
    """One fenced block of code.

    `line` is where its code begins, counted from 1. `expected` is the text that follows it and
    `span` that text's place in the page; `not_run` is the reason why it is left out, `peer` the
    environment that runs it.
    """

    language: str
    code: str
    line: int
    expected: str | None
    span: tuple[int, int] | None
    not_run: str | None
    peer: str | None


@dataclass(frozen=True)
class Page:
    """A page and its blocks of code, in order."""

    path: Path
    text: str
    blocks: tuple[Block, ...]

    @classmethod
    def read(cls, path: Path) -> Page:
        """The page in a file."""
        text = path.read_text("utf-8")
        found = list(_FENCE.finditer(text))
        blocks = []
        for place, match in enumerate(found):
            if match["language"] not in RUN:
                continue
            after = found[place + 1] if place + 1 < len(found) else None
            adjacent = after is not None and not text[match.end() : after.start()].strip()
            shown = (
                after if adjacent and after is not None and after["language"] == "text" else None
            )
            blocks.append(
                Block(
                    language=match["language"],
                    code=match["code"],
                    line=text.count("\n", 0, match.start("code")) + 1,
                    expected=None if shown is None else shown["code"],
                    span=None if shown is None else shown.span("code"),
                    not_run=match["reason"],
                    peer=match["peer"],
                )
            )
        return cls(path, text, tuple(blocks))

    @property
    def model(self) -> str:
        """The model that the page serves: the one that it tells `make serve` of."""
        named = _SERVED.search(self.text)
        return DEMO.name if named is None else named[1]

    @property
    def pictures(self) -> tuple[str, ...]:
        """The pictures shown that the page itself draws."""
        return tuple(dict.fromkeys(_PICTURE.findall(self.text)))


@dataclass
class Session:
    """What the blocks of one page share. Assumes nothing else prints or changes directory."""

    page: Page
    folder: Path
    url: str
    environment: Mapping[str, str]
    namespace: dict[str, object] = field(default_factory=dict)

    def run(self, block: Block) -> str:
        """What the block prints; raises `PageFailed`."""
        code = block.code.replace(ADDRESS, self.url)
        if block.peer is not None:
            # Theirs alone: our packages are not on their path.
            own = {k: v for k, v in self.environment.items() if k != "PYTHONPATH"}
            python = _python_of(block.peer)
            own["PATH"] = f"{Path(python).parent}{os.pathsep}{own['PATH']}"
            bash = ["bash", "-euo", "pipefail", "-c", code]
            command = bash if block.language == "bash" else [python, "-c", code]
            printed = self._command(command, block, own)
        elif block.language == "bash":
            printed = self._command(
                ["bash", "-euo", "pipefail", "-c", code], block, self.environment
            )
        else:
            printed = self._python(code, block)
        lines = (line.rstrip() for line in printed.replace(self.url, ADDRESS).splitlines())
        return "".join(f"{line}\n" for line in lines)

    def _python(self, code: str, block: Block) -> str:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.chdir(self.folder):
            try:
                exec(compile(code, self._place(block), "exec"), self.namespace)
            except Exception as error:
                raise PageFailed(
                    f"{self._place(block)}: {type(error).__name__}: {error}"
                ) from error
        return printed.getvalue()

    def _command(self, command: list[str], block: Block, environment: Mapping[str, str]) -> str:
        done = subprocess.run(
            command,
            cwd=self.folder,
            env=dict(environment),
            capture_output=True,
            text=True,
            timeout=LIVENESS_SECONDS,
            check=False,
        )
        if done.returncode:
            raise PageFailed(
                f"{self._place(block)}: exit code {done.returncode}\n{done.stdout[-2000:]}\n"
                f"{done.stderr[-2000:]}"
            )
        return done.stdout

    def _place(self, block: Block) -> str:
        return f"{self.page.path.name}, the block at line {block.line}"


def _python_of(peer: str) -> str:
    folder = ROOT / ".venvs" / peer
    if not (folder / ".ready").exists():
        raise PageFailed(f"the environment {peer!r} is missing: run `make oracles clients`")
    return str(folder / "bin" / "python")


@contextlib.contextmanager
def session(page: Page, folder: Path) -> Iterator[Session]:
    """A folder, a registry and a server for one page."""
    registry, work = folder / "registry", folder / "work"
    work.mkdir(parents=True)
    # As in a clone, where a page's commands are typed.
    (work / "vectors").symlink_to(ROOT / "vectors", target_is_directory=True)
    with live_server(registry, page.model) as url:
        yield Session(page, work, url, _environment(registry))


def outputs(session: Session) -> Iterator[tuple[Block, str]]:
    """Runs every block that is not left out; each with what it printed."""
    for block in session.page.blocks:
        if block.not_run is None:
            yield block, session.run(block)


def agrees(printed: str, expected: str) -> bool:
    """Whether two outputs say the same, where what is fitted differs between processors.

    Decimal fractions may differ by two units of their last digit, or by 2 %; of `name@hash` only
    the name counts. All else is compared letter by letter.
    """
    texts = [_HASH.sub("@", text) for text in (printed, expected)]
    if _DECIMAL.sub("#", texts[0]) != _DECIMAL.sub("#", texts[1]):
        return False
    pairs = zip(*(_DECIMAL.findall(text) for text in texts), strict=True)
    return all(_near(one, other) for one, other in pairs)


def _near(one: str, other: str) -> bool:
    unit = 10.0 ** -len(other.partition(".")[2])
    return abs(float(one) - float(other)) <= max(2.001 * unit, 0.02 * abs(float(other)))


def updated(page: Page, printed: Iterable[tuple[Block, str]]) -> str:
    """The page's text with these outputs in place of those it shows."""
    text = page.text
    for block, output in sorted(printed, key=lambda pair: pair[0].line, reverse=True):
        if block.span is not None:
            start, end = block.span
            text = text[:start] + output + text[end:]
    return text


def _environment(registry: Path) -> dict[str, str]:
    """Commands of this environment, this registry, and one width of output on every machine."""
    own = {name: value for name, value in os.environ.items() if not name.startswith("STEER_")}
    return {
        **own,
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{own.get('PATH', '')}",
        "STEER_REGISTRY": str(registry),
        "COLUMNS": "120",
        "NO_COLOR": "1",
        "TERM": "dumb",
        "OMP_NUM_THREADS": "1",
        # Clients of the server ask nobody else, and keep what they write in the page's folder.
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(registry.parent / "huggingface"),
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LLM_USER_PATH": str(registry.parent / "llm"),
    }


def main(
    pages: Annotated[list[Path], typer.Argument(help="Pages in Markdown.")],
    update: Annotated[bool, typer.Option("--update", help="Write the outputs.")] = False,
) -> None:
    """Run the code of pages; without --update, say where the output is another."""
    torch.set_num_threads(1)  # as in the tests: another number sums in another order
    differing = 0
    for path in pages:
        page = Page.read(path)
        if all(block.not_run is not None for block in page.blocks):
            continue
        with tempfile.TemporaryDirectory() as folder, session(page, Path(folder)) as running:
            printed: list[tuple[Block, str]] = []
            try:
                for block, output in outputs(running):
                    printed.append((block, output))
                    if not update and block.expected not in (None, output):
                        differing += 1
                        typer.echo(f"{path}, the block at line {block.line} prints:\n{output}")
                for name in page.pictures if update else ():
                    shutil.copy(running.folder / name, ROOT / "docs" / "images" / name)
            except (PageFailed, OSError) as error:
                differing += 1
                typer.echo(str(error), err=True)
            if update:
                path.write_text(updated(page, printed), "utf-8")
    raise typer.Exit(1 if differing else 0)


if __name__ == "__main__":
    typer.run(main)
