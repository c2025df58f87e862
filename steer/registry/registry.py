"""The registry: named, versioned artefacts in a folder that many processes may share."""

from __future__ import annotations

import hashlib
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any, TypeVar

from steer.control_vector import ArtefactKind, ControlVector, LowRankAdapter
from steer.errors import (
    Conflict,
    FileFormatError,
    SteerError,
    StorageError,
)
from steer.formats.importing import Artefact, read_artefact
from steer.formats.options import ImportOptions
from steer.registry import locks
from steer.registry.caches import AnswerCache, LoadedCache
from steer.registry.catalogue import Draft
from steer.registry.disk import disk_errors
from steer.registry.entry import Entry, parse_ref
from steer.registry.job_files import JobFiles
from steer.registry.job_store import JobStore
from steer.registry.opening import Folder, open_folder
from steer.registry.profiles import (
    Profile,
    delete_profile,
    references,
    store_profile,
    stored_profile,
    stored_profiles,
    unknown_profile,
    users_of,
)
from steer.registry.staging import Upload
from steer.sae.base import SAE
from steer.spec import check_name

T = TypeVar("T")

_MAX_UPLOAD = 512 << 20
_CACHE_BYTES = 1 << 30
_CACHED_ANSWERS = 65_536


@dataclass(frozen=True)
class RegistryStats:
    """Figures for metrics: bytes of all blobs, names by kind, operations since it was opened."""

    blob_bytes: int
    artefacts: dict[str, int]
    profiles: int
    operations: dict[str, int]


class Registry:
    """Artefacts and profiles by name. Open it with `Registry.open`.

    Assumes: its folder is on a local disk with POSIX locks.
    Guarantees: what a call has returned survives a crash; what it has not returned is never
    visible in part; every method may be called from any thread, and other processes may have the
    same folder open.
    """

    def __init__(self, folder: Folder, max_upload_bytes: int, cache_bytes: int) -> None:
        self._lock_file = folder.lock_file
        self._catalogue = folder.catalogue
        self._blobs = folder.blobs
        self._staging = folder.staging
        self.jobs = JobStore(folder.catalogue)
        self.job_files = JobFiles(folder.lock_file.parent / "jobs")
        self._max_upload_bytes = max_upload_bytes
        self._entries: AnswerCache[tuple[ArtefactKind, str], Entry] = AnswerCache(_CACHED_ANSWERS)
        self._profiles: AnswerCache[str, Profile] = AnswerCache(_CACHED_ANSWERS)
        self._totals: AnswerCache[None, tuple[int, dict[str, int], int]] = AnswerCache(1)
        self._loaded: LoadedCache[tuple[str, str, str], Any] = LoadedCache(cache_bytes)
        self._operations: Counter[str] = Counter()
        self._operations_lock = threading.Lock()

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        max_upload_bytes: int = _MAX_UPLOAD,
        cache_bytes: int = _CACHE_BYTES,
    ) -> Registry:
        """The registry in the folder `location`, made where there is none.

        Removes what writers that died left behind. Raises `StorageError` for a folder that cannot
        be used, `Unsupported` for a URL that is not a local folder.
        """
        return cls(open_folder(location), max_upload_bytes, cache_bytes)

    def close(self) -> None:
        """Releases files and locks."""
        self._staging.close()
        self._catalogue.close()

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    # Writing

    def add(self, name: str, artefact: Artefact) -> tuple[Entry, bool]:
        """Registers `artefact` under `name`; its entry, and whether that is new.

        It is not new if the newest version of that name has the same content already; otherwise
        it becomes the newest version.
        """
        _check_stored_name(name)
        data = artefact.to_bytes()
        card = artefact.card
        draft = Draft(card.kind, name, hashlib.sha256(data).hexdigest(), len(data), card)
        self._count("add")
        with (
            disk_errors(f"storing {name!r}"),
            self._staging.written(data) as staged,
            locks.shared(self._lock_file),
        ):
            # First the blob, then the row: a row whose blob is missing must never be seen.
            self._blobs.publish(staged, draft.sha256)
            with self._catalogue.writing() as connection:
                return self._catalogue.insert(connection, draft)

    def add_shipped(self, name: str, artefact: Artefact) -> Entry | None:
        """Registers `artefact` unless this content has had this name before.

        So a start-up may offer the same artefacts every time: one that was replaced or removed in
        the meantime stays so, and the answer is None.
        """
        with self._catalogue.reading() as connection:
            if self._catalogue.was_registered(
                connection, artefact.card.kind, name, artefact.sha256
            ):
                return None
        entry, created = self.add(name, artefact)
        return entry if created else None

    def upload(self) -> Upload:
        """A file to be received piece by piece: `with registry.upload() as upload: …`."""
        self._count("upload")
        return Upload(self._staging, self._max_upload_bytes)

    def scratch(self) -> AbstractContextManager[Path]:
        """A path on the registry's disk for one file or folder, removed at the end."""
        return self._staging.temporary()

    def import_file(
        self,
        path: Path,
        *,
        kind: ArtefactKind | None = None,
        name: str | None = None,
        options: ImportOptions = ImportOptions(),  # noqa: B008 - frozen
    ) -> tuple[Entry, bool]:
        """Registers the artefact in a file (or SAELens folder) of any known format.

        `name` defaults to the file's stem. Raises `FileFormatError` for what cannot be read or is
        not of `kind`, `TooLarge` for an archive that unpacks to too much.
        """
        chosen = _check_stored_name(name if name is not None else path.stem)
        self._count("import")
        if not path.exists():
            raise FileFormatError(f"there is no file {str(path)!r}", code="no_such_file")
        try:
            with disk_errors("reading an import"), self._staging.temporary() as scratch:
                artefact = read_artefact(
                    path, options, scratch=scratch, unpacked_limit=2 * self._max_upload_bytes
                )
        except StorageError:
            raise
        except SteerError as error:
            raise error.at("/file") from error.__cause__
        if kind is not None and artefact.card.kind != kind:
            raise FileFormatError(
                f"the file holds a {artefact.card.kind}, not a {kind}: upload it as a "
                f"{artefact.card.kind}",
                code="wrong_kind",
                param="/file",
            )
        return self.add(chosen, artefact)

    def remove(self, kind: ArtefactKind, ref: str) -> Entry:
        """Removes a name with all its versions, or with `name@hash` only that content.

        Returns the newest entry removed. Raises `Conflict` while a profile needs it.
        """
        parsed = parse_ref(kind, ref)
        # Alone: a blob must not go while another writer is about to refer to it.
        with locks.exclusive(self._lock_file):
            with self._catalogue.writing() as connection:
                live = self._catalogue.versions(connection, kind, parsed.name)
                gone = [entry for entry in live if entry.sha256.startswith(parsed.hash_prefix)]
                if not gone:
                    raise self._catalogue.unknown(connection, kind, ref)
                removed = {entry.sha256 for entry in gone}
                kept = {entry.sha256 for entry in live} - removed
                users = users_of(connection, kind, parsed.name, removed, kept)
                if users:
                    raise Conflict(
                        f"the {kind} {ref!r} is used by the profiles {', '.join(users)}: change "
                        "or remove them first",
                        code="in_use",
                    )
                self._catalogue.mark_removed(connection, gone)
                orphans = [h for h in removed if not self._catalogue.in_use(connection, h)]
            with disk_errors(f"removing {ref!r}"):
                for sha256 in orphans:
                    self._blobs.remove(sha256)
        self._count("remove")
        return gone[0]

    # Reading

    def entry(self, kind: ArtefactKind, ref: str) -> Entry:
        """The newest entry that `ref` (`name`, or `name@` and at least 6 hex digits) names.

        Raises `UnknownArtefact` (`unknown_vector`, `unknown_sae`, `unknown_low_rank`).
        """
        return self._entries.get(
            (kind, ref), self._catalogue.state(), lambda: self._catalogue.resolve(kind, ref)
        )

    def entries(
        self,
        kind: ArtefactKind | None = None,
        *,
        query: str | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[Entry]:
        """The newest version of each name, in order; `query` is part of a name or description."""
        return self._catalogue.newest(kind, query, limit, offset)

    def versions(self, kind: ArtefactKind, name: str) -> list[Entry]:
        """All versions of a name, newest first; raises `UnknownArtefact` if there is none."""
        with self._catalogue.reading() as connection:
            found = self._catalogue.versions(connection, kind, parse_ref(kind, name).name)
            if not found:
                raise self._catalogue.unknown(connection, kind, name)
            return found

    def vector(self, ref: str) -> ControlVector:
        """The vector that `ref` names; `card.name` is its registered name."""
        return self._load("vector", ref, ControlVector.from_bytes)

    def sae(self, ref: str) -> SAE:
        """The SAE that `ref` names."""
        return self._load("sae", ref, SAE.from_bytes)

    def low_rank(self, ref: str) -> LowRankAdapter:
        """The low-rank adapter that `ref` names."""
        return self._load("low_rank", ref, LowRankAdapter.from_bytes)

    def content(self, kind: ArtefactKind, ref: str) -> IO[bytes]:
        """The canonical file that `ref` names, open for reading; the caller closes it."""
        entry = self.entry(kind, ref)
        self._count("content")
        return self._present(entry, lambda: self._blobs.open(entry.sha256))

    def _load(self, kind: ArtefactKind, ref: str, read: Callable[..., T]) -> T:
        entry = self.entry(kind, ref)

        def load() -> T:
            self._count("load")
            data = self._present(entry, lambda: self._blobs.read(entry.sha256))
            return read(data, name=entry.name)

        # The name is part of the key because it is on the card of the loaded object.
        key = (entry.kind, entry.name, entry.sha256)
        loaded: T = self._loaded.get(key, entry.size_bytes, load)
        return loaded

    def _present(self, entry: Entry, read: Callable[[], T]) -> T:
        try:
            with disk_errors(f"reading {entry.id!r}"):
                return read()
        except StorageError:
            # Another process may have removed it since it was looked up: then it is unknown now.
            self._catalogue.resolve(entry.kind, entry.id)
            raise

    # Profiles

    def put_profile(self, profile: Profile) -> Profile:
        """Stores a profile, in place of one with the same name.

        Raises `UnknownArtefact` if its spec names what is not registered.
        """
        with self._catalogue.writing() as connection:
            for kind, ref, param in references(profile.spec):
                if self._catalogue.find(connection, kind, parse_ref(kind, ref)) is None:
                    raise self._catalogue.unknown(connection, kind, ref).at("/spec" + param)
            store_profile(connection, profile)
        self._count("put_profile")
        return profile

    def profile(self, name: str) -> Profile:
        """The profile called `name`; raises `UnknownArtefact` (`unknown_profile`)."""
        return self._profiles.get(name, self._catalogue.state(), lambda: self._find_profile(name))

    def profiles(self) -> list[Profile]:
        """All profiles by name."""
        with self._catalogue.reading() as connection:
            return stored_profiles(connection)

    def remove_profile(self, name: str) -> None:
        """Removes a profile; raises `UnknownArtefact` if there is none."""
        with self._catalogue.writing() as connection:
            if not delete_profile(connection, name):
                raise unknown_profile(connection, name)
        self._count("remove_profile")

    def _find_profile(self, name: str) -> Profile:
        with self._catalogue.reading() as connection:
            found = stored_profile(connection, name)
            if found is None:
                raise unknown_profile(connection, name)
            return found

    # Figures

    def stats(self) -> RegistryStats:
        """Figures for metrics."""
        blob_bytes, artefacts, profile_count = self._totals.get(
            None, self._catalogue.state(), self._count_all
        )
        with self._operations_lock:
            operations = dict(self._operations)
        return RegistryStats(blob_bytes, dict(artefacts), profile_count, operations)

    def _count_all(self) -> tuple[int, dict[str, int], int]:
        with self._catalogue.reading() as connection:
            sizes = self._catalogue.contents(connection)
            counts = self._catalogue.counts(connection)
            return sum(sizes.values()), counts, len(stored_profiles(connection))

    def _count(self, operation: str) -> None:
        with self._operations_lock:
            self._operations[operation] += 1


def _check_stored_name(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise SteerError(str(error), code="invalid_name", param="/name") from None
