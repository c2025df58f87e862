"""The catalogue: which names stand for which blobs, and the profiles. SQLite, many processes."""

from __future__ import annotations

import difflib
import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import Connection, Select, func, or_, select, update
from sqlalchemy.exc import SQLAlchemyError

from steer.control_vector import ArtefactKind, Card
from steer.errors import StorageError, UnknownArtefact
from steer.registry.entry import Entry, Ref, parse_ref
from steer.registry.schema import artefacts, open_database

_LIVE = artefacts.c.removed_at.is_(None)
_SUGGESTION_POOL = 1000


class Draft(NamedTuple):
    """An artefact whose blob is in its place, to be catalogued."""

    kind: ArtefactKind
    name: str
    sha256: str
    size_bytes: int
    card: Card


class Catalogue:
    """Rows about artefacts.

    Assumes: the blob of a draft exists before it is inserted.
    Guarantees: every change is one transaction; a lookup is one indexed query, however many
    artefacts there are; safe from many threads and processes.
    """

    def __init__(self, path: Path) -> None:
        self.engine = open_database(path)
        self._watch_lock = threading.Lock()
        self._watch = self.engine.raw_connection()

    def close(self) -> None:
        self._watch.close()
        self.engine.dispose()

    def state(self) -> int:
        """A number that changes whenever any connection of any process commits a change.

        It comes from one connection that never writes: SQLite counts the commits of all others.
        """
        with self._watch_lock:
            cursor = self._watch.cursor()
            try:
                cursor.execute("PRAGMA data_version")
                row: Any = cursor.fetchone()
                return int(row[0])
            finally:
                cursor.close()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A transaction that sees one state of the catalogue."""
        with self._transaction(writes=False) as connection:
            yield connection

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that holds the write lock from its beginning."""
        with self._transaction(writes=True) as connection:
            yield connection

    @contextmanager
    def _transaction(self, *, writes: bool) -> Iterator[Connection]:
        try:
            with self.engine.connect() as connection:
                connection.execution_options(steer_write=writes)  # of this connection only
                with connection.begin():
                    yield connection
        except SQLAlchemyError as error:
            raise StorageError(f"the registry's catalogue failed: {error}") from error

    def insert(self, connection: Connection, draft: Draft) -> tuple[Entry, bool]:
        """The entry of `draft`, and whether it is new: it is not if the newest version of its
        name already has this content."""
        found = self.find(connection, draft.kind, Ref(draft.name))
        if found is not None and found.sha256 == draft.sha256:
            return found, False
        named = (artefacts.c.kind == draft.kind) & (artefacts.c.name == draft.name)
        last = connection.execute(select(func.max(artefacts.c.version)).where(named)).scalar()
        entry = Entry(
            kind=draft.kind,
            name=draft.name,
            version=(last or 0) + 1,
            sha256=draft.sha256,
            size_bytes=draft.size_bytes,
            card=draft.card.model_copy(update={"name": draft.name}),
            created_at=datetime.now(UTC),
        )
        connection.execute(artefacts.insert(), _row(entry))
        return entry, True

    def find(self, connection: Connection, kind: ArtefactKind, ref: Ref) -> Entry | None:
        """The newest entry that `ref` names."""
        query = _named(kind, ref).order_by(artefacts.c.version.desc()).limit(1)
        row = connection.execute(query).mappings().first()
        return _entry(row) if row else None

    def resolve(self, kind: ArtefactKind, ref: str) -> Entry:
        """The newest entry that `ref` names; raises `UnknownArtefact` with near names."""
        parsed = parse_ref(kind, ref)
        with self.reading() as connection:
            entry = self.find(connection, kind, parsed)
            if entry is None:
                raise self.unknown(connection, kind, ref)
            return entry

    def unknown(self, connection: Connection, kind: ArtefactKind, ref: str) -> UnknownArtefact:
        """The error for a reference that names nothing, with the names it may have meant."""
        name = parse_ref(kind, ref).name
        versions = self.versions(connection, kind, name)
        if versions:
            return UnknownArtefact(
                f"the {kind} {name!r} has no version with the hash in {ref!r}; its versions: "
                + ", ".join(entry.id for entry in versions[:5]),
                code=f"unknown_{kind}",
            )
        names = select(artefacts.c.name).where(_LIVE, artefacts.c.kind == kind).distinct()
        # Names that begin alike first: with thousands registered, comparing all is too slow.
        begins_alike = names.where(artefacts.c.name.between(name[:1], name[:1] + "\U0010ffff"))
        pool = [
            *connection.execute(begins_alike.limit(_SUGGESTION_POOL)).scalars(),
            *connection.execute(names.limit(100)).scalars(),
        ]
        near = difflib.get_close_matches(name, dict.fromkeys(pool), n=3)
        hint = f"did you mean {', '.join(map(repr, near))}?" if near else _known(pool)
        return UnknownArtefact(f"there is no {kind} named {ref!r}; {hint}", code=f"unknown_{kind}")

    def versions(self, connection: Connection, kind: ArtefactKind, name: str) -> list[Entry]:
        """The live versions of a name, newest first."""
        query = _named(kind, Ref(name)).order_by(artefacts.c.version.desc())
        return [_entry(row) for row in connection.execute(query).mappings()]

    def newest(
        self, kind: ArtefactKind | None, text: str | None, limit: int, offset: int
    ) -> list[Entry]:
        """The newest live version of each name, by kind and name."""
        newest = select(func.max(artefacts.c.id)).where(_LIVE)
        if kind is not None:
            newest = newest.where(artefacts.c.kind == kind)
        newest = newest.group_by(artefacts.c.kind, artefacts.c.name)
        query = select(artefacts).where(artefacts.c.id.in_(newest))
        if text:
            like = "%" + text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_") + "%"
            described = artefacts.c.description
            query = query.where(
                or_(artefacts.c.name.like(like, escape="\\"), described.like(like, escape="\\"))
            )
        query = query.order_by(artefacts.c.kind, artefacts.c.name).limit(limit).offset(offset)
        with self.reading() as connection:
            return [_entry(row) for row in connection.execute(query).mappings()]

    def was_registered(
        self, connection: Connection, kind: ArtefactKind, name: str, sha256: str
    ) -> bool:
        """Whether this content has ever had this name, even if it was removed since."""
        query = select(artefacts.c.id).where(
            artefacts.c.kind == kind, artefacts.c.name == name, artefacts.c.sha256 == sha256
        )
        return connection.execute(query.limit(1)).first() is not None

    def mark_removed(self, connection: Connection, entries: Sequence[Entry]) -> None:
        now = datetime.now(UTC).replace(tzinfo=None)
        for entry in entries:
            connection.execute(
                update(artefacts)
                .where(
                    artefacts.c.kind == entry.kind,
                    artefacts.c.name == entry.name,
                    artefacts.c.version == entry.version,
                )
                .values(removed_at=now)
            )

    def in_use(self, connection: Connection, sha256: str) -> bool:
        """Whether a live entry has this content."""
        query = select(artefacts.c.id).where(_LIVE, artefacts.c.sha256 == sha256).limit(1)
        return connection.execute(query).first() is not None

    def contents(self, connection: Connection) -> dict[str, int]:
        """The sizes of all blobs that live entries refer to, by hash."""
        query = select(artefacts.c.sha256, artefacts.c.size_bytes).where(_LIVE).distinct()
        return {row.sha256: row.size_bytes for row in connection.execute(query)}

    def counts(self, connection: Connection) -> dict[str, int]:
        """How many names there are of each kind."""
        query = (
            select(artefacts.c.kind, func.count(artefacts.c.name.distinct()))
            .where(_LIVE)
            .group_by(artefacts.c.kind)
        )
        return {row[0]: row[1] for row in connection.execute(query)}


def _named(kind: ArtefactKind, ref: Ref) -> Select[Any]:
    query = select(artefacts).where(_LIVE, artefacts.c.kind == kind, artefacts.c.name == ref.name)
    if not ref.newest:
        query = query.where(artefacts.c.sha256.startswith(ref.hash_prefix))
    return query


def _known(names: Sequence[str]) -> str:
    if not names:
        return "none is registered: upload one first"
    shown = list(dict.fromkeys(names))[:5]
    return f"registered are {', '.join(map(repr, shown))}" + (", …" if len(names) > 5 else "")


def _row(entry: Entry) -> dict[str, Any]:
    card = entry.card.model_dump(mode="json", by_alias=True, exclude={"name"})
    return {
        "kind": entry.kind,
        "name": entry.name,
        "version": entry.version,
        "sha256": entry.sha256,
        "size_bytes": entry.size_bytes,
        "card": json.dumps(card, sort_keys=True),
        "description": entry.card.description,
        "created_at": entry.created_at.replace(tzinfo=None),
    }


def _entry(row: Any) -> Entry:
    card = Card.model_validate_json(row["card"])
    return Entry(
        kind=row["kind"],
        name=row["name"],
        version=row["version"],
        sha256=row["sha256"],
        size_bytes=row["size_bytes"],
        card=card.model_copy(update={"name": row["name"]}),
        created_at=row["created_at"].replace(tzinfo=UTC),
    )
