"""Where surveys lie: `<location>/features`, one a SAE, under its content hash."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem
from safetensors import SafetensorError
from safetensors.numpy import load, save_file

from steer.errors import StorageError, UnknownArtefact
from steer.registry.blobs.blobs import open_filesystem, store_errors
from steer.registry.blobs.disk import disk_errors
from steer.registry.features.survey import Array, Survey, SurveyCard


class SurveyStore:
    """The surveys of the SAEs in a registry at `location`; `read_only` is why none may be kept.

    Guarantees: a survey appears whole or not at all; a newer one takes the place of an older.
    """

    def __init__(self, location: str, *, read_only: str | None = None) -> None:
        self._read_only = read_only
        self._fs, self._root = open_filesystem(f"{location.rstrip('/')}/features")
        self._local = isinstance(self._fs, LocalFileSystem)

    def check_writable(self) -> None:
        """Raises `StorageError` (`read_only`) where nothing may be kept."""
        if self._read_only is not None:
            raise StorageError(self._read_only, code="read_only")

    def find(self, sae: str) -> Survey | None:
        """The survey of the SAE with this hash; None where none was made.

        Raises `StorageError` (`damaged_survey`).
        """
        self._fs.invalidate_cache()
        with store_errors("looking for a survey"):
            if not self._fs.exists(self._path(sae)):
                return None
        return Survey.read(partial(self._fs.open, self._path(sae), "rb"))

    def of(self, sae: str, name: str) -> Survey:
        """As `find`; raises `UnknownArtefact` (`no_survey`) with what to do."""
        found = self.find(sae)
        if found is None:
            raise UnknownArtefact(
                f"the SAE {name!r} has no survey: make one with `steer sae survey {name}`, or "
                "POST /v1/steering/sae/survey",
                code="no_survey",
            )
        return found

    def local_path(self, sae: str) -> Path | None:
        """Where the survey lies, or would lie, on a local disk; None elsewhere."""
        return Path(self._path(sae)) if self._local else None

    def keep(self, card: SurveyCard, arrays: Mapping[str, Array], scratch: Path) -> None:
        """Writes a survey, by way of a file in the folder `scratch`."""
        self._write(self._path(card.sae), arrays, {"survey": card.model_dump_json()}, scratch)

    def checkpoint(self, key: str) -> dict[str, Array] | None:
        """What `keep_checkpoint` kept under `key`; None where there is nothing whole."""
        with store_errors("looking for a checkpoint"):
            self._fs.invalidate_cache()
            if not self._fs.exists(self._partial(key)):
                return None
            data = self._fs.cat_file(self._partial(key))
        try:
            return dict(load(data))
        except SafetensorError:
            return None  # cut off: the work is done again

    def keep_checkpoint(self, key: str, state: Mapping[str, Array], scratch: Path) -> None:
        """Keeps how far a survey has come, in the place of what was kept before."""
        self._write(self._partial(key), state, {}, scratch)

    def drop_checkpoint(self, key: str) -> None:
        """Removes the checkpoint, where there is one."""
        with store_errors("removing a checkpoint"):
            if self._fs.exists(self._partial(key)):
                self._fs.rm_file(self._partial(key))

    def prune(self, kept: Collection[str]) -> int:
        """Removes what lies beside SAEs whose hashes are not `kept`: surveys, checkpoints,
        findings, labels. How many files."""
        self._fs.invalidate_cache()
        with store_errors("listing surveys"):
            if not self._fs.exists(self._root):
                return 0
            paths: list[Any] = self._fs.find(self._root)
            # What lies beside an SAE begins with its hash: a survey, a checkpoint, a folder.
            old = [path for path in paths if self._sae_of(str(path)) not in kept]
            for path in old:
                self._fs.rm_file(path)
        return len(old)

    def _write(
        self, target: str, arrays: Mapping[str, Array], metadata: dict[str, str], scratch: Path
    ) -> None:
        """The file whole or not at all: written beside its place on a disk, sent to a store."""
        self.check_writable()
        folder = Path(target).parent if self._local else scratch
        staged = folder / f"{uuid.uuid4().hex}.tmp"
        plain = {name: np.ascontiguousarray(one) for name, one in arrays.items()}
        with disk_errors("keeping a survey"), store_errors("storing a survey"):
            folder.mkdir(parents=True, exist_ok=True)
            try:
                save_file(plain, staged, metadata=metadata)
                if self._local:
                    os.replace(staged, target)
                else:
                    self._fs.put_file(str(staged), target)
            finally:
                staged.unlink(missing_ok=True)

    def _sae_of(self, path: str) -> str:
        """The hash that a file's path begins with."""
        inside = path.partition(self._root.strip("/") + "/")[2]
        return re.split(r"[/.-]", inside, maxsplit=1)[0]

    def _path(self, sae: str) -> str:
        return f"{self._root}/{sae}.safetensors"

    def _partial(self, key: str) -> str:
        return f"{self._root}/{key}.partial"
