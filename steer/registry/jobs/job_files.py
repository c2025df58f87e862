"""Files of jobs, on this machine's disk until the job has run: what clients sent with it, and what
it has kept of its work."""

from __future__ import annotations

import glob
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from pathlib import Path

from steer.registry.blobs import locks
from steer.registry.blobs.disk import disk_errors

_JOURNAL, _ANSWERS = ".journal", ".answers"


class JobFiles:
    """One folder under `root` for each job that has files, and beside it what it keeps of its work.

    Guarantees: files outlive a crash of the process that received them; what belongs to no
    unfinished job is removed by `clean`, and never while a job is being queued.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = root / "files.lock"
        with disk_errors("opening the folder for jobs"):
            root.mkdir(parents=True, exist_ok=True)
            self.place = self._identity()
        """Names this folder: the servers that see it can run the jobs whose files are here."""

    @contextmanager
    def adding(self, job_id: str, files: Mapping[str, Path]) -> Iterator[None]:
        """Moves `files` (names to paths) to the job's folder; queue the job inside the block.

        Where the block raises, they are removed.
        """
        with locks.shared(self._lock):
            folder = self.folder(job_id)
            try:
                with disk_errors("keeping the files of a job"):
                    if files:
                        folder.mkdir()
                    for name, path in files.items():
                        shutil.move(path, folder / name)
                yield
            except BaseException:
                self.remove(job_id)
                raise

    def folder(self, job_id: str) -> Path:
        """Where the job's files are, if it has any."""
        return self._root / job_id

    def journal(self, job_id: str) -> Path:
        """The file in which the job may write down what it would otherwise do again; names that
        begin with its name are the job's too."""
        return self._root / f"{job_id}{_JOURNAL}"

    def answers(self, job_id: str) -> Path:
        """The file in which the job may write down what other models have told it."""
        return self._root / f"{job_id}{_ANSWERS}"

    def remove(self, job_id: str) -> None:
        """Removes all that belongs to the job. May be called for a job without files."""
        shutil.rmtree(self.folder(job_id), ignore_errors=True)
        self.answers(job_id).unlink(missing_ok=True)
        for one in self._root.glob(f"{glob.escape(job_id)}{_JOURNAL}*"):
            one.unlink(missing_ok=True)

    def clean(self, unfinished: Callable[[], AbstractSet[str]]) -> int:
        """Removes what no unfinished job needs; how many jobs it was of."""
        with locks.exclusive(self._lock):
            needed = unfinished()
            held = {
                one.name.removesuffix(_ANSWERS).partition(_JOURNAL)[0]
                for one in self._root.iterdir()
                if one.is_dir() or one.name.endswith(_ANSWERS) or _JOURNAL in one.name
            }
            for job_id in held - needed:
                self.remove(job_id)
            return len(held - needed)

    def _identity(self) -> str:
        path = self._root / "place"
        with locks.exclusive(self._lock):
            if not path.exists() or not path.read_text("utf-8"):
                path.write_text(uuid.uuid4().hex, "utf-8")
            return path.read_text("utf-8")
