"""A whole registry as one tar file: written and read in one pass, in bounded memory.

The members, in this order: `manifest.json` (format, and the size and hash of the next), then
`catalogue.jsonl` (one row a line), then `blobs/<sha256>` for every content that a row has. Nothing
is ever unpacked by the name in an archive.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import tarfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, BinaryIO

from pydantic import BaseModel, ConfigDict, ValidationError
from sqlalchemy import select

from steer.errors import FileFormatError, StorageError
from steer.registry.blobs.blobs import BlobStore
from steer.registry.blobs.staging import Staging
from steer.registry.catalogue.aliases import stored_aliases
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.catalogue.schema import artefacts, profiles, tags

FORMAT = "steer-registry"
VERSION = 2
_READ = (1, VERSION)
"""In the first version, profiles had no models."""
MANIFEST = "manifest.json"
ROWS = "catalogue.jsonl"
BLOBS = "blobs/"

_BLOCK = 1 << 20
_MAX_MANIFEST = 1 << 20
_ROWS_AT_ONCE = 500


class Manifest(BaseModel):
    """The first member: what the rest must be."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str
    version: int
    rows: int
    rows_bytes: int
    rows_sha256: str
    blobs: int
    blob_bytes: int


@dataclass(frozen=True)
class Exported:
    """What an archive holds."""

    versions: int
    profiles: int
    aliases: int
    blobs: int
    blob_bytes: int


def write_archive(
    catalogue: Catalogue,
    blobs: BlobStore,
    staging: Staging,
    target: BinaryIO,
    progress: Callable[[int], None] = lambda _: None,
) -> Exported:
    """Writes the registry, as one moment saw it, to `target`; removed versions that can be restored
    are in it. `progress` is told the bytes of each blob.

    Raises `StorageError` for a blob that is missing or damaged.
    """
    with staging.temporary() as spool:
        counts, contents = _spool_rows(catalogue, spool)
        rows_sha256, rows_bytes = _digest(spool)
        manifest = Manifest(
            format=FORMAT,
            version=VERSION,
            rows=sum(counts.values()),
            rows_bytes=rows_bytes,
            rows_sha256=rows_sha256,
            blobs=len(contents),
            blob_bytes=sum(contents.values()),
        )
        with tarfile.open(fileobj=target, mode="w|", format=tarfile.PAX_FORMAT) as archive:
            described = manifest.model_dump_json(indent=1).encode()
            _add(archive, MANIFEST, io.BytesIO(described), len(described))
            with spool.open("rb") as stream:
                _add(archive, ROWS, stream, rows_bytes)
            for sha256, size in contents.items():
                with blobs.open_unchecked(sha256) as stream:
                    _add(archive, BLOBS + sha256, _Checked(stream, sha256), size)
                progress(size)
    return Exported(
        counts["artefact"], counts["profile"], counts["alias"], len(contents), manifest.blob_bytes
    )


def _spool_rows(catalogue: Catalogue, spool: Path) -> tuple[dict[str, int], dict[str, int]]:
    """Writes the rows; how many of each kind there are, and the contents with their sizes."""
    counts = {"artefact": 0, "tags": 0, "alias": 0, "profile": 0}
    contents: dict[str, int] = {}
    with spool.open("w", encoding="utf-8") as stream, catalogue.reading() as connection:
        query = select(artefacts).order_by(artefacts.c.id)
        streamed = connection.execution_options(yield_per=_ROWS_AT_ONCE)
        for row in streamed.execute(query).mappings():
            if row["purged_at"] is None:
                contents[row["sha256"]] = row["size_bytes"]
            _line(stream, counts, "artefact", {key: _plain(row[key]) for key in _COLUMNS})
        query = select(tags).order_by(tags.c.kind, tags.c.name, tags.c.tag)
        for row in streamed.execute(query).mappings():
            _line(stream, counts, "tags", dict(row))
        for alias in stored_aliases(connection):
            _line(stream, counts, "alias", vars(alias))
        stored = select(profiles.c.profile).order_by(profiles.c.name, profiles.c.model)
        for text in streamed.execute(stored).scalars():
            _line(stream, counts, "profile", json.loads(text))
    return counts, contents


_COLUMNS = (
    "kind",
    "name",
    "version",
    "sha256",
    "size_bytes",
    "card",
    "created_at",
    "removed_at",
    "purged_at",
)


def _line(stream: IO[str], counts: dict[str, int], what: str, row: dict[str, Any]) -> None:
    counts[what] += 1
    stream.write(json.dumps({"row": what, **row}, sort_keys=True, ensure_ascii=False) + "\n")


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else value


def _digest(path: Path) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    with path.open("rb") as stream:
        while block := stream.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return digest.hexdigest(), size


def _add(archive: tarfile.TarFile, name: str, stream: Any, size: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode = size, 0o644
    try:
        archive.addfile(member, stream)
    except OSError as error:
        if "unexpected end of data" not in str(error):
            raise
        raise StorageError(
            f"{name} is shorter than its {size} bytes", code="damaged_blob"
        ) from None
    if isinstance(stream, _Checked):
        stream.finish()


class _Checked:
    """A blob on its way into an archive, whose hash is looked at when it has passed."""

    def __init__(self, stream: IO[bytes], sha256: str) -> None:
        self._stream, self._sha256 = stream, sha256
        self._digest = hashlib.sha256()

    def read(self, size: int) -> bytes:
        data = self._stream.read(size)
        self._digest.update(data)
        return data

    def finish(self) -> None:
        if self._digest.hexdigest() != self._sha256 or self._stream.read(1):
            raise StorageError(
                f"the blob {self._sha256[:12]} is damaged: its bytes no longer match its hash. "
                "Upload the artefact again to repair it, then export",
                code="damaged_blob",
            )


class Reader:
    """An archive that is read once, from its beginning.

    Raises `FileFormatError` (`damaged_archive`) naming the member that is not what it should be.
    """

    def __init__(self, source: BinaryIO, staging: Staging) -> None:
        self._source, self._staging = source, staging

    def read(
        self, spool: Path, keep: Callable[[Path, str], None], progress: Callable[[int], None]
    ) -> Manifest:
        """Writes the rows to `spool`, and gives every blob, checked, to `keep` as a file that it
        may take away."""
        try:
            with tarfile.open(fileobj=self._source, mode="r|") as archive:
                members = self._members(archive)
                manifest = self._manifest(*next(members, (None, None)))
                self._rows(spool, manifest, *next(members, (None, None)))
                count = 0
                for member, stream in members:
                    self._blob(member, stream, keep)
                    progress(member.size)
                    count += 1
        except tarfile.TarError as error:
            raise damaged(f"it is not a whole tar file ({error})") from error
        if count != manifest.blobs:
            raise damaged(f"it ends after {count} of {manifest.blobs} blobs")
        return manifest

    def _members(self, archive: tarfile.TarFile) -> Iterator[tuple[tarfile.TarInfo, IO[bytes]]]:
        for member in archive:
            # A sparse one is as long as it says, and may say anything.
            plain = member.isreg() and not member.issparse()
            stream = archive.extractfile(member) if plain else None
            if stream is None:
                raise damaged(f"its member {member.name[:100]!r} is no plain file")
            yield member, stream

    def _manifest(self, member: tarfile.TarInfo | None, stream: IO[bytes] | None) -> Manifest:
        if member is None or stream is None or member.name != MANIFEST:
            raise FileFormatError(
                f"the file is no archive of a registry: it does not begin with {MANIFEST}. Give "
                "what 'steer registry export' wrote",
                code="not_an_archive",
            )
        if member.size > _MAX_MANIFEST:
            raise damaged(f"its {MANIFEST} is {member.size} bytes long")
        try:
            described = json.loads(stream.read())
            if described.get("format") == FORMAT and described.get("version") not in _READ:
                raise FileFormatError(
                    f"the archive has version {described.get('version')!r}; this Steer reads "
                    f"{' and '.join(map(str, _READ))}: use the Steer that wrote it, or a newer one",
                    code="unknown_archive_version",
                )
            return Manifest.model_validate(described)
        except (ValueError, ValidationError, AttributeError) as error:
            raise damaged(f"its {MANIFEST} cannot be read ({error})") from error

    def _rows(
        self,
        spool: Path,
        manifest: Manifest,
        member: tarfile.TarInfo | None,
        stream: IO[bytes] | None,
    ) -> None:
        if member is None or stream is None or member.name != ROWS:
            raise damaged(f"its second member is not {ROWS}")
        if member.size != manifest.rows_bytes or _copied(stream, spool) != manifest.rows_sha256:
            raise damaged(f"its {ROWS} does not match the hash in {MANIFEST}")

    def _blob(
        self, member: tarfile.TarInfo, stream: IO[bytes], keep: Callable[[Path, str], None]
    ) -> None:
        sha256 = member.name.removeprefix(BLOBS)
        if member.name != BLOBS + sha256 or len(sha256) != 64:
            raise damaged(f"its member {member.name[:100]!r} is not known")
        with self._staging.temporary() as staged:
            if _copied(stream, staged) != sha256:
                raise damaged(f"its blob {sha256[:12]} does not match its hash")
            keep(staged, sha256)


def _copied(stream: IO[bytes], path: Path) -> str:
    """Writes the stream to a file, on the disk; the hash of its bytes."""
    digest = hashlib.sha256()
    with path.open("wb") as target:
        while block := stream.read(_BLOCK):
            digest.update(block)
            target.write(block)
        target.flush()
        os.fsync(target.fileno())
    return digest.hexdigest()


def damaged(what: str) -> FileFormatError:
    """The error for an archive that is not what it was when it was written."""
    return FileFormatError(
        f"the archive is damaged: {what}. Nothing of it was registered; export it again",
        code="damaged_archive",
    )
