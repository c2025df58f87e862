"""Jobs of the kind `import`: an artefact from a file that a client sent, or from a URL."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field

from steer.artefacts.kinds import ArtefactKind
from steer.engines.base import Engine
from steer.errors import SteerError, StorageError, Unsupported
from steer.formats.hub import SCHEME, parse_hub_ref
from steer.formats.options import ImportOptions
from steer.jobs.kinds.kind import JobContext, JobKind, Report
from steer.registry.registry import Registry
from steer.spec import Site, StoredName


class Download(NamedTuple):
    """A file or folder to import, and where it is from, as its card will say."""

    path: Path
    origin: str | None = None


Fetch = Callable[[str, Path, Report], Download]
"""Downloads a URL, into an existing folder or a cache of its own; it may report bytes as progress,
and raises `SteerError`."""

UPLOAD = "upload"
"""The name of a single file among the job's files."""


class ImportParams(BaseModel):
    """What to import: `source` is a URL; without one the file comes with the job.

    `artefact` is the kind that it must be; the rest is as for uploads.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    name: StoredName
    source: Annotated[str, Field(min_length=1, max_length=2048)] | None = None
    artefact: ArtefactKind | None = None
    layer_offset: Annotated[int, Field(ge=-1024, le=1024)] | None = None
    layers: (
        Annotated[
            tuple[Annotated[int, Field(ge=0)], ...],
            Field(min_length=1, max_length=1024, fail_fast=True),
        ]
        | None
    ) = None
    writer: Annotated[str | None, Field(alias="from", max_length=64)] = None
    position: Annotated[int, Field(ge=-(1 << 20), lt=1 << 20)] | None = None
    site: Site | None = None
    experiment: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    strength: Annotated[float, Field(allow_inf_nan=False)] | None = None
    description: Annotated[str, Field(max_length=4096)] | None = None
    licence: Annotated[str, Field(max_length=256)] | None = None
    model: Annotated[str, Field(max_length=512)] | None = None

    @property
    def options(self) -> ImportOptions:
        """What the client says about the file."""
        given = self.model_dump(exclude={"name", "source", "artefact", "writer"})
        return ImportOptions(**given, source=self.writer)


def import_kind(fetchers: Mapping[str, Fetch]) -> JobKind[ImportParams]:
    """Imports from files, and from URLs of the schemes in `fetchers` (`hf` for `hf://…`)."""

    def check(_engine: Engine, _registry: Registry, params: ImportParams) -> None:
        if params.source is not None:
            _fetcher(fetchers, params.source)
            if params.source.startswith(SCHEME):
                _check_hub_ref(params.source)
        params.options  # noqa: B018 - raises what is wrong with them

    def run(context: JobContext, params: ImportParams) -> dict[str, Any]:
        if params.source is not None:
            context.progress(0, None, f"fetching {params.source}")
            found = _fetcher(fetchers, params.source)(
                params.source, context.scratch, context.progress
            )
        else:
            found = Download(_sent(context.files))
        context.progress(0, 1, "reading the file")
        entry, created = context.registry.import_file(
            found.path,
            kind=params.artefact,
            name=params.name,
            options=replace(params.options, origin=found.origin),
            model=context.engine.info,
        )
        context.progress(1, 1, "registered")
        return {
            "id": entry.id,
            "artefact": entry.kind,
            "name": entry.name,
            "version": entry.version,
            "sha256": entry.sha256,
            "size_bytes": entry.size_bytes,
            "created": created,
        }

    return JobKind(
        name="import",
        params=ImportParams,
        run=run,
        check=check,
        repeatable=True,  # the same content under the same name is no new version
        any_model=_for_another_model,
    )


def _for_another_model(engine: Engine, params: ImportParams) -> bool:
    """Whether the client says so; any other import has to fit the model of this server."""
    return params.model is not None and not engine.info.is_called(params.model)


def _fetcher(fetchers: Mapping[str, Fetch], source: str) -> Fetch:
    scheme = urlsplit(source).scheme if "://" in source else ""
    if scheme not in fetchers:
        known = ", ".join(f"{name}://" for name in sorted(fetchers)) or "no URLs"
        raise Unsupported(
            f"{source[:80]!r} cannot be imported: this server takes {known}, and files sent as "
            "multipart/form-data",
            param="/source",
            code="unsupported_source",
        )
    return fetchers[scheme]


def _check_hub_ref(source: str) -> None:
    try:
        parse_hub_ref(source)
    except SteerError as error:
        raise error.at("/source") from None


def _sent(folder: Path) -> Path:
    """The file that came with the job, or the folder where there were several."""
    single = folder / UPLOAD
    if single.exists():
        return single
    if folder.is_dir():
        return folder
    raise StorageError(
        "the file of this job is gone from the server's disk: send it again", code="input_lost"
    )
