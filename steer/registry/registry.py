"""The registry: named, versioned artefacts in a place that many processes may share."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, BinaryIO, TypeVar

from steer.artefacts.affine import AffineMap
from steer.artefacts.artefact import Artefact, StoredArtefact
from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.kinds import NAMED, ArtefactKind, row_of
from steer.artefacts.lens import Lens
from steer.artefacts.oracle import Oracle
from steer.artefacts.sae.base import SAE
from steer.errors import FileFormatError, SteerError, StorageError
from steer.formats.importing import check_model, read_artefact
from steer.formats.options import ImportOptions
from steer.model import ModelInfo
from steer.registry import naming
from steer.registry.archive import transfer
from steer.registry.archive.archive import Exported
from steer.registry.archive.merging import Imported
from steer.registry.blobs.caches import AnswerCache, LoadedCache
from steer.registry.blobs.disk import disk_errors
from steer.registry.blobs.garbage import GRACE_SECONDS, Garbage, collect
from steer.registry.blobs.plan_store import TOUCH_SECONDS, PlanStore
from steer.registry.blobs.staging import Upload, WrittenFile
from steer.registry.catalogue.aliases import Alias, stored_aliases
from steer.registry.catalogue.catalogue import Draft
from steer.registry.catalogue.listing import Search, found_entries
from steer.registry.catalogue.model_view import EVERYONE, ModelView
from steer.registry.catalogue.tags import tags_of_names
from steer.registry.entry import Entry, parse_ref
from steer.registry.features.findings import BesideFiles, FindingStore
from steer.registry.features.labels import KnownLabels, LabelStore
from steer.registry.features.meanings import MeaningStore
from steer.registry.features.store import SurveyStore
from steer.registry.figures import RegistryFigures, RegistryStats
from steer.registry.jobs.job_files import JobFiles
from steer.registry.jobs.job_outputs import JobOutputs
from steer.registry.jobs.job_store import JobStore
from steer.registry.location import locate
from steer.registry.opening import Parts, open_parts
from steer.registry.profiles import (
    Profile,
    delete_profiles,
    find_profile,
    profiles_for,
    save_profile,
)
from steer.registry.read_only import is_read_only, open_read_only
from steer.spec import check_name

T = TypeVar("T")
A = TypeVar("A", bound=Artefact)

_MAX_UPLOAD = 512 << 20
_CACHE_BYTES = 1 << 30
_CACHED_ANSWERS = 65_536
_CACHED_LISTS = 64


class Registry:
    """Artefacts and profiles by name. Open it with `Registry.open`.

    Guarantees: what a call has returned survives a crash; what it has not returned is never
    visible in part; every method may be called from any thread, and other processes, on other
    machines where the place can be reached from them, may have the same registry open.
    """

    def __init__(self, parts: Parts, max_upload_bytes: int, cache_bytes: int) -> None:
        self._parts = parts
        self._blobs = parts.blobs
        self._leases = parts.leases
        self._staging = parts.staging
        self.jobs = JobStore(parts.catalogue)
        self.job_files = JobFiles(parts.location.work / "jobs")
        self.job_outputs = JobOutputs(parts.location.work / "outputs")
        self.surveys = SurveyStore(parts.location.root, read_only=parts.catalogue.read_only)
        beside = BesideFiles(parts.location.root, read_only=parts.catalogue.read_only)
        self.findings, self.side_labels = FindingStore(beside), LabelStore(beside)
        self.meanings = MeaningStore(beside)
        self._max_upload_bytes = max_upload_bytes
        self._loaded: LoadedCache[tuple[str, str, str], Any] = LoadedCache(cache_bytes)
        self._figures = RegistryFigures(parts.catalogue)
        self._read_for(EVERYONE)

    def _read_for(self, view: ModelView) -> None:
        self._catalogue = self._parts.catalogue.for_model(view)
        self._entries: AnswerCache[tuple[ArtefactKind, str], Entry] = AnswerCache(_CACHED_ANSWERS)
        self._profiles: AnswerCache[str, Profile] = AnswerCache(_CACHED_ANSWERS)
        self._profile_lists: AnswerCache[str | None, list[Profile]] = AnswerCache(_CACHED_LISTS)

    @classmethod
    def open(
        cls,
        location: str | Path,
        *,
        catalogue: str | None = None,
        max_upload_bytes: int = _MAX_UPLOAD,
        cache_bytes: int = _CACHE_BYTES,
    ) -> Registry:
        """The registry at `location`, made where there is none, its schema brought up to date.

        `location` is a folder, or the URL of one that fsspec opens (`s3://bucket/prefix`).
        `catalogue` is a SQLAlchemy URL (`postgresql+psycopg://user@host/database`); a folder has
        its own, a SQLite file. Removes what writers that died left behind. Raises `StorageError`
        for a place that cannot be used, `Unsupported` for one of an unknown kind and for a URL
        without a catalogue.
        """
        place = locate(location, catalogue)
        parts = open_read_only(place) if is_read_only(place) else open_parts(place)
        return cls(parts, max_upload_bytes, cache_bytes)

    def for_model(self, model: ModelInfo | str, *also: str) -> Registry:
        """This registry, read for `model` (which may `also` be called so): a name means its newest
        version for that model, and only where there is none the newest of all; what is another
        model's is not listed. `name@hash` means the same for every model.

        A version is for the model that its card names, or for all that have its width. Both are
        one registry: closing one closes the other.
        """
        view = ModelView.of(model, *also)
        if view == self._catalogue.view:
            return self
        seen = copy.copy(self)
        seen._read_for(view)
        return seen

    @property
    def read_only(self) -> bool:
        """Whether it lies on a disk that cannot be written, and every change is refused."""
        return self._catalogue.read_only is not None

    def close(self) -> None:
        """Releases files, locks and connections."""
        self._parts.close()

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

        It is not new if the newest version of that name, of those for its model, has the same
        content already; otherwise it becomes the newest version.
        """
        _check_stored_name(name)
        card = artefact.card
        self._figures.count("add")
        self._catalogue.check_writable()
        with disk_errors(f"storing {name!r}"):
            # First the blob, then the row: a row whose blob is missing must never be seen.
            written = self._publish(artefact)
            draft = Draft(card.kind, name, written.sha256, written.size_bytes, card)
            with self._catalogue.writing() as connection:
                if not self._blobs.holds(draft.sha256, draft.size_bytes):
                    # Collected since, as it had no row. Nobody collects in this transaction.
                    self._publish(artefact)
                return self._catalogue.insert(connection, draft)

    def _publish(self, artefact: Artefact) -> WrittenFile:
        with self._staging.written(_pieces(artefact)) as written:
            self._blobs.publish(written.path, written.sha256)
            return written

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
        self._figures.count("upload")
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
        model: ModelInfo | None = None,
    ) -> tuple[Entry, bool]:
        """Registers the artefact in a file (or SAELens folder) of any known format.

        `name` defaults to the file's stem. With `model`, the artefact must fit that model unless
        its card names another (`check_model`). Raises `FileFormatError` for what cannot be read or
        is not of `kind`, `TooLarge` for an archive that unpacks to too much,
        `IncompatibleArtefact` for what does not fit.
        """
        chosen = _check_stored_name(name if name is not None else path.stem)
        self._figures.count("import")
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
                f"{artefact.card.kind} (to /v1/steering/{NAMED[artefact.card.kind].plural}; "
                f"`steer vectors import` takes every kind)",
                code="wrong_kind",
                param="/file",
            )
        if model is not None:
            check_model(artefact, model)
        return self.add(chosen, artefact)

    def remove(self, kind: ArtefactKind, ref: str) -> Entry:
        """Removes a name with all its versions for the model that the registry is read for, or with
        `name@hash` only that content.

        They can be restored until garbage collection. Returns the newest entry removed. Raises
        `Conflict` (`in_use`) while a profile or an alias needs it.
        """
        removed = naming.remove(self._catalogue, kind, ref)
        self._figures.count("remove")
        return removed

    def restore(self, kind: ArtefactKind, ref: str) -> Entry:
        """Brings back what was removed: a name with all its versions for this model, or `name@hash`
        alone.

        Returns the newest entry restored. Raises `UnknownArtefact` where there is nothing (any
        more), `Conflict` (`name_taken`) where the name has become an alias.
        """
        restored = naming.restore(self._catalogue, self._blobs, kind, ref)
        self._figures.count("restore")
        return restored

    def collect_garbage(
        self, *, grace_seconds: float = GRACE_SECONDS, dry_run: bool = False
    ) -> Garbage:
        """Deletes for good what was removed more than `grace_seconds` ago, uploads that never got a
        name, and plans that were not used for as long.

        Never what a name, a profile or an alias needs, nor what a process has loaded in the last
        hours (`steer.registry.blobs.leases`).
        """
        if not grace_seconds >= 0:
            raise SteerError(
                f"a grace period of {grace_seconds!r} seconds: give 0 or more", code="invalid_age"
            )
        with disk_errors("collecting garbage"):
            done = collect(
                self._catalogue,
                self._blobs,
                self._leases,
                grace_seconds=grace_seconds,
                dry_run=dry_run,
            )
            pruned = 0
            if not dry_run:
                self.surveys.prune(set(self._blobs.names()))
                plans = PlanStore(self._parts.location.root)
                pruned = plans.prune(max(grace_seconds, 2 * TOUCH_SECONDS))
        self._figures.count("collect_garbage")
        return replace(done, plans=pruned)

    # Names

    def set_alias(self, kind: ArtefactKind, name: str, target: str) -> Alias:
        """Makes `name` stand for `target`, a name or `name@hash`; an alias of that name is moved.

        Raises `UnknownArtefact` for an unknown target, `Conflict` for a name that an artefact has.
        """
        _check_stored_name(name)
        alias = naming.set_alias(self._catalogue, kind, name, target)
        self._figures.count("set_alias")
        return alias

    def unset_alias(self, kind: ArtefactKind, name: str) -> Alias:
        """Removes an alias; raises `UnknownArtefact`, or `Conflict` while a profile uses it."""
        alias = naming.unset_alias(self._catalogue, kind, name)
        self._figures.count("unset_alias")
        return alias

    def aliases(self, kind: ArtefactKind | None = None, target: str | None = None) -> list[Alias]:
        """All aliases by kind and name; those of one kind, or for one artefact."""
        with self._catalogue.reading() as connection:
            return stored_aliases(connection, kind, target)

    def change_tags(
        self,
        kind: ArtefactKind,
        name: str,
        *,
        add: Iterable[str] = (),
        remove: Iterable[str] = (),
    ) -> tuple[str, ...]:
        """Puts tags on a name and takes others off; the tags it has then, in order."""
        held = naming.change_tags(self._catalogue, kind, name, add=add, remove=remove)
        self._figures.count("change_tags")
        return held

    def tags(self, kind: ArtefactKind, names: Sequence[str]) -> dict[str, tuple[str, ...]]:
        """The tags of several names; names without tags are left out."""
        with self._catalogue.reading() as connection:
            return tags_of_names(connection, kind, names)

    # The whole

    def export_archive(
        self, target: BinaryIO, progress: Callable[[int], None] = lambda _: None
    ) -> Exported:
        """Writes everything to one tar file; `progress` is told the bytes of each blob."""
        self._figures.count("export")
        return transfer.export_archive(self._parts, target, progress)

    def import_archive(
        self, source: BinaryIO, progress: Callable[[int], None] = lambda _: None
    ) -> Imported:
        """Adds everything in an archive that is not here; nothing here is changed.

        Nothing is visible before all of it is here. Raises `FileFormatError` (`damaged_archive`).
        """
        self._figures.count("import_archive")
        return transfer.import_archive(self._parts, source, progress)

    # Reading

    @property
    def local(self) -> bool:
        """Whether `state` and `keep` are answered by this machine, and so at once."""
        return self._catalogue.local and self._leases.local

    def state(self) -> int:
        """A number that is another one after every change of what a name means, by any process."""
        return self._catalogue.state()

    def keep(self, sha256s: Iterable[str]) -> None:
        """Renews the leases of artefacts that are in use without being loaded again."""
        for sha256 in sha256s:
            self._leases.take(sha256)

    def entry(self, kind: ArtefactKind, ref: str) -> Entry:
        """What `ref` (`name`, or `name@` and at least 6 hex digits) means: the newest version, of
        those for the model that the registry is read for where there is one (`for_model`).

        Raises `UnknownArtefact`, its code `unknown_` and the kind.
        """
        return self._entries.get(
            (kind, ref), self._catalogue.state(), lambda: self._catalogue.resolve(kind, ref)
        )

    def entries(
        self,
        kind: ArtefactKind | None = None,
        *,
        query: str | None = None,
        model: str | None = None,
        width: int | None = None,
        tag: str | None = None,
        deleted: bool = False,
        limit: int = 100,
        offset: int = 0,
    ) -> list[Entry]:
        """The version that each name means here, in order, where everything given fits.

        `query` is part of a name, description or tag. `deleted` lists what can be restored. Names
        that are another model's alone are left out, unless with that `model`, or `EVERY_MODEL`.
        """
        search = Search(kind, query, model, width, tag, deleted)
        view = self._catalogue.view
        with self._catalogue.reading() as connection:
            return found_entries(connection, view, search, limit=limit, offset=offset)

    def versions(self, kind: ArtefactKind, name: str) -> list[Entry]:
        """All versions of a name, for whatever models, newest first.

        Raises `UnknownArtefact` if there is none.
        """
        with self._catalogue.reading() as connection:
            entry = self._catalogue.find(connection, kind, parse_ref(kind, name))
            if entry is None:
                raise self._catalogue.unknown(connection, kind, name)
            return self._catalogue.versions(connection, kind, entry.name)

    def vector(self, ref: str) -> ControlVector:
        """The vector that `ref` names; `card.name` is its registered name."""
        return self.load(ControlVector, ref)

    def vector_names(self, *, width: int, limit: int) -> tuple[str, ...]:
        """The first `limit` names of vectors of this width, in order."""
        return tuple(one.name for one in self.entries("vector", width=width, limit=limit))

    def sae(self, ref: str) -> SAE:
        """The SAE that `ref` names."""
        return self.load(SAE, ref)

    def labels(self, ref: str) -> KnownLabels:
        """What the features of the SAE that `ref` names are called: by its own labels, and by those
        beside it."""
        return self.side_labels.known(self.entry("sae", ref).sha256, self.sae(ref).labels)

    def low_rank(self, ref: str) -> LowRankAdapter:
        """The low-rank adapter that `ref` names."""
        return self.load(LowRankAdapter, ref)

    def lens(self, ref: str) -> Lens:
        """The tuned lens that `ref` names."""
        return self.load(Lens, ref)

    def affine(self, ref: str) -> AffineMap:
        """The affine map that `ref` names."""
        return self.load(AffineMap, ref)

    def detector(self, ref: str) -> Detector:
        """The detector that `ref` names."""
        return self.load(Detector, ref)

    def oracle(self, ref: str) -> Oracle:
        """The oracle that `ref` names."""
        return self.load(Oracle, ref)

    def probe(self, ref: str) -> ConceptProbe:
        """The probe that `ref` names."""
        return self.load(ConceptProbe, ref)

    def content(self, kind: ArtefactKind, ref: str) -> IO[bytes]:
        """The canonical file that `ref` names, open for reading; the caller closes it.

        Raises `UnknownArtefact`, and `StorageError` where it is missing or damaged.
        """
        entry = self.entry(kind, ref)
        self._leases.take(entry.sha256)
        self._figures.count("content")
        return self._present(entry, lambda: self._blobs.open(entry.sha256))

    def load(self, artefact: type[A], ref: str) -> A:
        """The artefact of this class that `ref` names; `card.name` is its registered name.

        Raises `UnknownArtefact`, and `StorageError` where its file is missing or damaged.
        """
        entry = self.entry(row_of(artefact).name, ref)
        # Also where it is loaded: a worker may read it by its hash while the request runs.
        self._leases.take(entry.sha256)

        def read() -> A:
            self._figures.count("load")
            if issubclass(artefact, StoredArtefact):
                with self._present(entry, lambda: self._blobs.open(entry.sha256)) as stream:
                    return artefact.from_file(stream, name=entry.name, sha256=entry.sha256)
            data = self._present(entry, lambda: self._blobs.read(entry.sha256))
            return artefact.from_bytes(data, name=entry.name)

        def size(loaded: A) -> int:
            if isinstance(loaded, StoredArtefact):
                return loaded.resident_bytes()
            return entry.size_bytes

        # The name is part of the key because it is on the card of the loaded object.
        key = (entry.kind, entry.name, entry.sha256)
        loaded: A = self._loaded.get(key, size, read)
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

    def put_profile(self, profile: Profile, *, pin: bool = False) -> Profile:
        """Stores a profile, in place of one with the same name and model; as it was stored.

        It is for the model that the registry is read for, unless it names another itself. With
        `pin`, every name in its spec becomes `name@hash` of what it means now, so that the profile
        keeps its meaning. Raises `UnknownArtefact` if its spec names what is not registered.
        """
        stored = save_profile(self._catalogue, profile, pin=pin)
        self._figures.count("put_profile")
        return stored

    def profile(self, name: str) -> Profile:
        """The profile called `name`; raises `UnknownArtefact` (`unknown_profile`)."""
        return self._profiles.get(
            name, self._catalogue.state(), lambda: find_profile(self._catalogue, name)
        )

    def profiles(self, model: str | None = None) -> list[Profile]:
        """The profiles that serve the model that the registry is read for, by name; those saved for
        another `model`; or with `EVERY_MODEL`, all."""
        found = self._profile_lists.get(
            model, self._catalogue.state(), lambda: profiles_for(self._catalogue, model)
        )
        return list(found)

    def remove_profile(self, name: str) -> None:
        """Removes a profile of this model or of all; raises `UnknownArtefact` if there is none."""
        delete_profiles(self._catalogue, name)
        self._figures.count("remove_profile")

    # RegistryFigures

    def stats(self) -> RegistryStats:
        """Figures for metrics."""
        return self._figures.stats()


def _pieces(artefact: Artefact) -> Iterable[bytes]:
    """The canonical file, in one piece where the artefact is in memory anyway."""
    if isinstance(artefact, StoredArtefact):
        return artefact.pieces()
    return (artefact.to_bytes(),)


def _check_stored_name(name: str) -> str:
    try:
        return check_name(name)
    except ValueError as error:
        raise SteerError(str(error), code="invalid_name", param="/name") from None
