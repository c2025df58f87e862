"""The catalogue: which names stand for which blobs. One database, many processes."""

from __future__ import annotations

import copy
import difflib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, Engine, Select, func, select, update
from sqlalchemy.exc import SQLAlchemyError

from steer.artefacts.control_vector import Card
from steer.artefacts.kinds import ArtefactKind
from steer.errors import Conflict, StorageError, UnknownArtefact
from steer.model import bare_name
from steer.registry.catalogue.aliases import stored_alias
from steer.registry.catalogue.database import WRITES, Database, identity_of
from steer.registry.catalogue.model_view import EVERYONE, ModelView
from steer.registry.catalogue.schema import artefacts
from steer.registry.catalogue.tags import add_card_tags
from steer.registry.entry import Entry, Ref, parse_ref

_LIVE = artefacts.c.removed_at.is_(None)
_RESTORABLE = artefacts.c.removed_at.is_not(None) & artefacts.c.purged_at.is_(None)
_SUGGESTION_POOL = 1000


class Draft(NamedTuple):
    """An artefact whose blob is in its place, to be catalogued."""

    kind: ArtefactKind
    name: str
    sha256: str
    size_bytes: int
    card: Card


class Catalogue:
    """Rows about artefacts, as one model sees them (`for_model`) or nobody in particular.

    Assumes: the blob of a draft exists before it is inserted.
    Guarantees: every change is one transaction; a lookup is one indexed query, however many
    artefacts there are; safe from many threads and processes.
    """

    def __init__(self, database: Database, *, read_only: str | None = None) -> None:
        self._database = database
        self.read_only = read_only
        """Why nothing may be changed, and what to do; None where changes are welcome."""
        self.view: ModelView = EVERYONE

    def for_model(self, view: ModelView) -> Catalogue:
        """The same catalogue, in which a name means what it means for a model."""
        seen = copy.copy(self)
        seen.view = view
        return seen

    @property
    def engine(self) -> Engine:
        return self._database.engine

    def close(self) -> None:
        self._database.close()

    @property
    def local(self) -> bool:
        """Whether `state` is answered by this machine."""
        return self._database.local

    def state(self) -> int:
        """A number that changes whenever a commit of any process changes rows."""
        try:
            return self._database.state()
        except SQLAlchemyError as error:
            raise _failed(error) from error

    def identity(self) -> str:
        """What tells this catalogue from all others."""
        with self.reading() as connection:
            return identity_of(connection)

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the catalogue."""
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its beginning.

        Raises `StorageError` (`read_only`) where nothing may be changed.
        """
        self.check_writable()
        with self._transaction(writes=True) as connection:
            yield connection

    def check_writable(self) -> None:
        """Raises `StorageError` (`read_only`) where nothing may be changed."""
        if self.read_only is not None:
            raise StorageError(self.read_only, code="read_only")

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        try:
            with self.engine.connect() as connection:
                connection.execution_options(**{WRITES: writes})  # of this connection only
                with connection.begin():
                    yield connection
        except SQLAlchemyError as error:
            raise _failed(error) from error

    def insert(self, connection: Connection, draft: Draft) -> tuple[Entry, bool]:
        """The entry of `draft`, and whether it is new: it is not if its name already means this
        content for the model that its card names. Raises `Conflict` where the name is an alias."""
        theirs = self.for_model(self.view.of_card(draft.card))
        found = theirs.find_named(connection, draft.kind, Ref(draft.name))
        if found is not None and found.sha256 == draft.sha256:
            return found, False
        self.check_free(connection, draft.kind, draft.name)
        entry = Entry(
            kind=draft.kind,
            name=draft.name,
            version=self.last_version(connection, draft.kind, draft.name) + 1,
            sha256=draft.sha256,
            size_bytes=draft.size_bytes,
            card=draft.card.model_copy(update={"name": draft.name}),
            created_at=datetime.now(UTC),
        )
        connection.execute(artefacts.insert(), row_of(entry))
        add_card_tags(connection, draft.kind, draft.name, draft.card.tags)
        return entry, True

    def last_version(self, connection: Connection, kind: ArtefactKind, name: str) -> int:
        """The highest number that a version of the name ever had; 0 where there was none."""
        named = (artefacts.c.kind == kind) & (artefacts.c.name == name)
        last = connection.execute(select(func.max(artefacts.c.version)).where(named)).scalar()
        return int(last or 0)

    def check_free(self, connection: Connection, kind: ArtefactKind, name: str) -> None:
        """Raises `Conflict` where `name` is an alias, and so cannot be an artefact's."""
        alias = stored_alias(connection, kind, name)
        if alias is not None:
            raise Conflict(
                f"{name!r} is an alias for the {kind} {alias.target!r}: choose another name, or "
                "remove the alias first",
                code="name_taken",
                param="/name",
            )

    def find_named(self, connection: Connection, kind: ArtefactKind, ref: Ref) -> Entry | None:
        """The newest entry with the name (and hash) in `ref`; aliases are not followed.

        By the name alone it is the newest one for the model whose view this is; only where there
        is none for it, the newest of all.
        """
        view = self.view if ref.newest else EVERYONE
        query = _named(kind, ref).order_by(*view.best_first(artefacts)).limit(1)
        row = connection.execute(query).mappings().first()
        return entry_of(row) if row else None

    def find(self, connection: Connection, kind: ArtefactKind, ref: Ref) -> Entry | None:
        """The entry that `ref` means (`find_named`), by its own name or by an alias."""
        entry = self.find_named(connection, kind, ref)
        if entry is None:
            alias = stored_alias(connection, kind, ref.name)
            meant = None if alias is None else alias.applied(ref)
            entry = None if meant is None else self.find_named(connection, kind, meant)
        return entry

    def resolve(self, kind: ArtefactKind, ref: str) -> Entry:
        """The entry that `ref` means; raises `UnknownArtefact` with near names."""
        parsed = parse_ref(kind, ref)
        with self.reading() as connection:
            entry = self.find(connection, kind, parsed)
            if entry is None:
                raise self.unknown(connection, kind, ref)
            return entry

    def unknown(self, connection: Connection, kind: ArtefactKind, ref: str) -> UnknownArtefact:
        """The error for a reference that names nothing, with the names it may have meant: those of
        the model whose view this is."""
        name = parse_ref(kind, ref).name
        versions = self.versions(connection, kind, name)
        if versions:
            return UnknownArtefact(
                f"the {kind} {name!r} has no version with the hash in {ref!r}; its versions: "
                + ", ".join(entry.id for entry in versions[:5]),
                code=f"unknown_{kind}",
            )
        names = select(artefacts.c.name).where(_LIVE, artefacts.c.kind == kind).distinct()
        own = self.view.is_own(artefacts)
        if own is not None:
            names = names.where(own)
        # Names that begin alike first: with thousands registered, comparing all is too slow.
        begins_alike = names.where(
            artefacts.c.name >= name[:1], artefacts.c.name <= name[:1] + "\U0010ffff"
        )
        pool = [
            *connection.execute(begins_alike.limit(_SUGGESTION_POOL)).scalars(),
            *connection.execute(names.limit(100)).scalars(),
        ]
        near = difflib.get_close_matches(name, dict.fromkeys(pool), n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else _known(pool, self.view)
        return UnknownArtefact(f"there is no {kind} named {ref!r}; {hint}", code=f"unknown_{kind}")

    def versions(self, connection: Connection, kind: ArtefactKind, name: str) -> list[Entry]:
        """The live versions of a name, newest first, whatever model they are for."""
        query = _named(kind, Ref(name)).order_by(artefacts.c.version.desc())
        return [entry_of(row) for row in connection.execute(query).mappings()]

    def removed(self, connection: Connection, kind: ArtefactKind, ref: Ref) -> list[Entry]:
        """The removed versions that `ref` names and that can be restored, newest first."""
        query = _named(kind, ref, _RESTORABLE).order_by(artefacts.c.version.desc())
        return [entry_of(row) for row in connection.execute(query).mappings()]

    def was_registered(
        self, connection: Connection, kind: ArtefactKind, name: str, sha256: str
    ) -> bool:
        """Whether this content has ever had this name, even if it was removed since."""
        query = select(artefacts.c.id).where(
            artefacts.c.kind == kind, artefacts.c.name == name, artefacts.c.sha256 == sha256
        )
        return connection.execute(query.limit(1)).first() is not None

    def mark_removed(
        self, connection: Connection, entries: Sequence[Entry], *, removed: bool = True
    ) -> None:
        """Removes the versions, or with `removed=False` brings them back."""
        now = datetime.now(UTC).replace(tzinfo=None)
        for entry in entries:
            connection.execute(
                update(artefacts)
                .where(
                    artefacts.c.kind == entry.kind,
                    artefacts.c.name == entry.name,
                    artefacts.c.version == entry.version,
                )
                .values(removed_at=now if removed else None)
            )

    def totals(self, connection: Connection) -> tuple[int, int]:
        """Bytes of all contents that live versions have, and of those that only removed ones
        have."""
        live = select(artefacts.c.sha256).where(_LIVE)
        totals = []
        for which in (_LIVE, _RESTORABLE & artefacts.c.sha256.not_in(live)):
            contents = select(artefacts.c.sha256, artefacts.c.size_bytes).where(which).distinct()
            total = select(func.sum(contents.subquery().c.size_bytes))
            totals.append(int(connection.execute(total).scalar() or 0))
        return totals[0], totals[1]

    def counts(self, connection: Connection) -> dict[str, int]:
        """How many names there are of each kind."""
        query = (
            select(artefacts.c.kind, func.count(artefacts.c.name.distinct()))
            .where(_LIVE)
            .group_by(artefacts.c.kind)
        )
        return {row[0]: row[1] for row in connection.execute(query)}


def _named(kind: ArtefactKind, ref: Ref, which: Any = _LIVE) -> Select[Any]:
    query = select(artefacts).where(which, artefacts.c.kind == kind, artefacts.c.name == ref.name)
    if not ref.newest:
        query = query.where(artefacts.c.sha256.startswith(ref.hash_prefix))
    return query


def _known(names: Sequence[str], view: ModelView) -> str:
    if not names:
        whose = "" if view.everyones else " for this model"
        return f"none is registered{whose}: upload one first"
    shown = list(dict.fromkeys(names))[:5]
    return f"registered are {', '.join(map(repr, shown))}" + (", …" if len(names) > 5 else "")


def _failed(error: SQLAlchemyError) -> StorageError:
    return StorageError(f"the registry's catalogue failed: {error}")


def row_of(entry: Entry) -> dict[str, Any]:
    """The columns of an entry's row."""
    card = entry.card.model_dump(mode="json", by_alias=True, exclude={"name"})
    removed = entry.removed_at
    return {
        "kind": entry.kind,
        "name": entry.name,
        "version": entry.version,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "card": json.dumps(card, sort_keys=True),
        "description": entry.card.description,
        "created_at": entry.created_at.replace(tzinfo=None),
        "removed_at": None if removed is None else removed.replace(tzinfo=None),
        "model": bare_name(entry.card.model) if entry.card.model else None,
        "width": entry.card.width,
    }


def entry_of(row: Any) -> Entry:
    """The entry in a row."""
    card = Card.model_validate_json(row["card"])
    removed = row["removed_at"]
    return Entry(
        kind=row["kind"],
        name=row["name"],
        version=row["version"],
        sha256=row["sha256"],
        size_bytes=row["size_bytes"],
        card=card.model_copy(update={"name": row["name"]}),
        created_at=row["created_at"].replace(tzinfo=UTC),
        removed_at=None if removed is None else removed.replace(tzinfo=UTC),
    )
