"""Files that jobs have made, on this machine's disk for as long as their job is remembered."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection
from collections.abc import Set as AbstractSet
from contextlib import suppress
from pathlib import Path

from steer.errors import UnknownArtefact
from steer.registry.blobs.disk import disk_errors

_UNDONE = (".part", ".lock")
"""The ends of names that files have while they are written."""


class JobOutputs:
    """One folder under `root` for each job that has made files.

    A repeated job finds what its earlier attempt had made. Clients are shown what is done.
    """

    def __init__(self, root: Path) -> None:
        self._root = root

    def folder(self, job_id: str) -> Path:
        """Where the job's files are, if it has any; the job makes it."""
        return self._root / job_id

    def files(self, job_id: str) -> tuple[Path, ...]:
        """The job's files, by name; none where they are on another machine."""
        folder = self.folder(job_id)
        with disk_errors("listing the files of a job"):
            found = sorted(folder.iterdir()) if folder.is_dir() else []
            return tuple(one for one in found if one.is_file() and one.suffix not in _UNDONE)

    def file(self, job_id: str, name: str) -> Path:
        """The file of this name; raises `UnknownArtefact` (`unknown_file`)."""
        found = self.files(job_id)
        for one in found:
            if one.name == name:
                return one
        known = ", ".join(one.name for one in found[:5]) or "none on this machine"
        raise UnknownArtefact(
            f"the job has no file {name!r}; it has {known}{', …' if len(found) > 5 else ''}",
            code="unknown_file",
        )

    def bytes_beside(self, job_id: str) -> int:
        """How much the files of all other jobs take."""
        found = 0
        for folder in self._folders():
            # A job may be forgotten, and a file be finished, while this is asked.
            with suppress(FileNotFoundError):
                if folder.name != job_id:
                    found += sum(one.stat().st_size for one in folder.iterdir())
        return found

    def remove(self, job_id: str) -> None:
        """Removes the job's files, if it has any."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)

    def clean(self, keeping: Callable[[Collection[str]], AbstractSet[str]]) -> None:
        """Removes the files of all jobs but those that `keeping` names, of the ones it is given."""
        held = [one.name for one in self._folders()]
        if held:
            for job_id in set(held) - keeping(held):
                self.remove(job_id)

    def _folders(self) -> list[Path]:
        if not self._root.is_dir():
            return []
        return [one for one in self._root.iterdir() if one.is_dir()]
