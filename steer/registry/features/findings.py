"""Where what was measured of single features lies: `<location>/features/<hash>/<kind>/<feature>`.

One small file for each finding, so that two who measure different features never wait for each
other, and one feature is shown by a few short reads.
"""

from __future__ import annotations

import os
import uuid
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel, ConfigDict, ValidationError

from steer.errors import StorageError
from steer.registry.blobs.blobs import open_filesystem, store_errors
from steer.registry.blobs.disk import disk_errors


class Finding(BaseModel):
    """What was measured of one feature of an SAE; `kept_as` is the folder of its kind."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kept_as: ClassVar[str]

    feature: int


Found = TypeVar("Found", bound=Finding)


class BesideFiles:
    """Small files beside SAEs, each under its SAE's hash; `read_only` is why none may be written.

    Guarantees: a file appears whole or not at all.
    """

    def __init__(self, location: str, *, read_only: str | None = None) -> None:
        self._read_only = read_only
        self._fs, self._root = open_filesystem(f"{location.rstrip('/')}/features")
        self._local = isinstance(self._fs, LocalFileSystem)

    def check_writable(self) -> None:
        """Raises `StorageError` (`read_only`) where nothing may be kept."""
        if self._read_only is not None:
            raise StorageError(self._read_only, code="read_only")

    def read(self, sae: str, *parts: str) -> bytes | None:
        """What the file holds; None where there is none."""
        path = self._path(sae, *parts)
        self._fs.invalidate_cache()
        with store_errors("reading what is known of features"):
            try:
                data: bytes = self._fs.cat_file(path)
            except FileNotFoundError:
                return None
        return data

    def version(self, sae: str, *parts: str) -> str | None:
        """A text that is another one once the file has changed; None where there is none."""
        self._fs.invalidate_cache()
        with store_errors("looking for what is known of features"):
            try:
                return str(self._fs.ukey(self._path(sae, *parts)))
            except FileNotFoundError:
                return None

    def names(self, sae: str, *parts: str) -> list[str]:
        """The names of the files in a folder, in order."""
        self._fs.invalidate_cache()
        with store_errors("listing what is known of features"):
            try:
                paths: list[Any] = self._fs.ls(self._path(sae, *parts), detail=False)
            except FileNotFoundError:
                return []
        return sorted(name for path in paths if not (name := Path(str(path)).name).endswith(".tmp"))

    def write(self, data: bytes, sae: str, *parts: str) -> None:
        """Writes a file, in the place of an older one."""
        self.check_writable()
        target = self._path(sae, *parts)
        with (
            disk_errors("keeping what is known of features"),
            store_errors("storing what is known of features"),
        ):
            if not self._local:
                self._fs.pipe_file(target, data)
                return
            folder = Path(target).parent
            folder.mkdir(parents=True, exist_ok=True)
            staged = folder / f"{uuid.uuid4().hex}.tmp"
            try:
                staged.write_bytes(data)
                os.replace(staged, target)
            finally:
                staged.unlink(missing_ok=True)

    def remove(self, sae: str, *parts: str) -> bool:
        """Removes a file; whether there was one."""
        self.check_writable()
        path = self._path(sae, *parts)
        with store_errors("removing what is known of features"):
            self._fs.invalidate_cache()
            if not self._fs.exists(path):
                return False
            self._fs.rm_file(path)
        return True

    def _path(self, sae: str, *parts: str) -> str:
        return "/".join((self._root, sae, *parts))


class FindingStore:
    """What was measured of the features of SAEs, in a registry's files; the newest of a kind."""

    def __init__(self, files: BesideFiles) -> None:
        self.files = files

    def keep(self, sae: str, finding: Finding) -> None:
        """Keeps a finding about the SAE with this hash."""
        name = f"{finding.feature}.json"
        self.files.write(finding.model_dump_json().encode(), sae, finding.kept_as, name)

    def find(self, sae: str, kind: type[Found], feature: int) -> Found | None:
        """The finding of a feature; None where it was not measured.

        Raises `StorageError` (`damaged_finding`).
        """
        name = f"{feature}.json"
        data = self.files.read(sae, kind.kept_as, name)
        if data is None:
            return None
        try:
            return kind.model_validate_json(data)
        except ValidationError as error:
            raise StorageError(
                f"what was measured of feature {feature} ({kind.kept_as}) is damaged: measure it "
                f"again with `steer sae {kind.kept_as}`",
                code="damaged_finding",
            ) from error

    def features(self, sae: str, kind: type[Found]) -> tuple[int, ...]:
        """The features of which there is a finding of this kind, in order."""
        names = self.files.names(sae, kind.kept_as)
        return tuple(sorted(int(stem) for name in names if (stem := Path(name).stem).isdigit()))
