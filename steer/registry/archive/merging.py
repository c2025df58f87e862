"""The rows of an archive on their way into a catalogue: what is missing is added, nothing is
changed, and doing it twice is doing it once."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from sqlalchemy import Connection, select

from steer.artefacts.control_vector import Card
from steer.artefacts.kinds import ArtefactKind
from steer.registry.archive.archive import damaged
from steer.registry.catalogue.aliases import Alias, store_alias, stored_alias
from steer.registry.catalogue.catalogue import Catalogue, row_of
from steer.registry.catalogue.schema import artefacts
from steer.registry.catalogue.tags import MAX_TAGS, check_tag, store_tags, stored_tags
from steer.registry.entry import Entry, Ref, parse_ref
from steer.registry.profiles import Profile, references, store_profile, stored_profile
from steer.spec import check_name

_SHA256 = r"^[0-9a-f]{64}$"


class ArtefactRow(BaseModel):
    """A version, as an archive has it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: ArtefactKind
    name: str
    version: int = Field(ge=1)
    sha256: str = Field(pattern=_SHA256)
    size_bytes: int = Field(ge=0)
    card: str
    created_at: datetime
    removed_at: datetime | None
    purged_at: datetime | None

    def entry(self) -> Entry:
        """The row as an entry."""
        card = Card.model_validate_json(self.card)
        return Entry(
            kind=self.kind,
            name=check_name(self.name),
            version=self.version,
            sha256=self.sha256,
            size_bytes=self.size_bytes,
            card=card.model_copy(update={"name": self.name}),
            created_at=self.created_at.replace(tzinfo=UTC),
            removed_at=None if self.removed_at is None else self.removed_at.replace(tzinfo=UTC),
        )


@dataclass
class Imported:
    """What an import added, and what it left as it was because something else has the name."""

    versions: int = 0
    profiles: int = 0
    aliases: int = 0
    tags: int = 0
    blobs: int = 0
    kept: list[str] = field(default_factory=list)


def needed_blobs(spool: Path) -> Iterator[tuple[str, int, str]]:
    """Hash, size and reference of every content that the rows need."""
    for what, row, line in _rows(spool):
        if what == "artefact":
            parsed = _parsed(row, line)
            if parsed.purged_at is None:
                yield parsed.sha256, parsed.size_bytes, f"{parsed.name}@{parsed.sha256[:12]}"


def merge_rows(catalogue: Catalogue, connection: Connection, spool: Path) -> Imported:
    """Adds what the rows have and the catalogue has not, in the transaction of `connection`.

    A name that is new here comes with all its versions, removed ones and numbers included. A name
    that is known gets the contents that it never had as newer versions, in their order. Aliases
    and profiles that differ from those here are left out and named in `kept`; tags are added.
    Raises `FileFormatError` (`damaged_archive`) for rows that mean nothing.
    """
    merge = _Merge(catalogue, connection)
    for what, row, line in _rows(spool):
        try:
            merge.take(what, row, line)
        except (ValueError, KeyError, TypeError) as error:
            raise damaged(f"line {line} of its catalogue cannot be read ({error})") from error
    return merge.done


class _Merge:
    def __init__(self, catalogue: Catalogue, connection: Connection) -> None:
        self._catalogue, self._connection = catalogue, connection
        self.done = Imported()
        self._new: set[tuple[str, str]] = set()
        """Names that came with the archive: only these keep their numbers."""

    def take(self, what: str, row: dict[str, Any], line: int) -> None:
        if what == "artefact":
            self._artefact(_parsed(row, line))
        elif what == "tags":
            self._tag(row["kind"], row["name"], row["tag"])
        elif what == "alias":
            self._alias(Alias(**row))
        elif what == "profile":
            self._profile(Profile.model_validate(row))
        else:
            raise damaged(f"line {line} of its catalogue is of no known kind")

    def _artefact(self, row: ArtefactRow) -> None:
        key = (row.kind, row.name)
        if key not in self._new and self._is_unknown(row):
            if stored_alias(self._connection, row.kind, row.name) is not None:
                self._keep(f"{row.kind} {row.name!r}: an alias has this name")
                return
            self._new.add(key)
        entry = row.entry()
        if key in self._new:
            purged = row.purged_at and row.purged_at.replace(tzinfo=None)
            values = {**row_of(entry), "purged_at": purged}
            self._connection.execute(artefacts.insert(), values)
            self.done.versions += row.removed_at is None
            return
        if row.removed_at is None and not self._had(row):
            last = self._catalogue.last_version(self._connection, row.kind, row.name)
            values = {**row_of(entry), "version": last + 1}
            self._connection.execute(artefacts.insert(), values)
            self.done.versions += 1

    def _is_unknown(self, row: ArtefactRow) -> bool:
        return self._catalogue.last_version(self._connection, row.kind, row.name) == 0

    def _had(self, row: ArtefactRow) -> bool:
        return self._catalogue.was_registered(self._connection, row.kind, row.name, row.sha256)

    def _tag(self, kind: ArtefactKind, name: str, tag: str) -> None:
        held = stored_tags(self._connection, kind, name)
        known = self._connection.execute(
            select(artefacts.c.id)
            .where(artefacts.c.kind == kind, artefacts.c.name == name)
            .limit(1)
        ).first()
        if tag in held or known is None or len(held) >= MAX_TAGS:
            return
        store_tags(self._connection, kind, name, (*held, check_tag(tag)))
        self.done.tags += 1

    def _alias(self, alias: Alias) -> None:
        check_name(alias.name)
        present = stored_alias(self._connection, alias.kind, alias.name)
        if present == alias:
            return
        meant = Ref(alias.target, alias.sha256 or "")
        if present is not None:
            self._keep(f"alias {alias.name!r}: here it stands for {present.ref!r}")
        elif self._catalogue.last_version(self._connection, alias.kind, alias.name):
            self._keep(f"alias {alias.name!r}: a {alias.kind} has this name")
        elif self._catalogue.find_named(self._connection, alias.kind, meant) is None:
            self._keep(f"alias {alias.name!r}: {alias.ref!r} is not registered here")
        else:
            store_alias(self._connection, alias)
            self.done.aliases += 1

    def _profile(self, profile: Profile) -> None:
        present = stored_profile(self._connection, profile.name, profile.model)
        if present == profile:
            return
        if present is not None:
            self._keep(f"profile {profile.name!r}: another one has this name")
            return
        for kind, ref, _ in references(profile):
            if self._catalogue.find(self._connection, kind, parse_ref(kind, ref)) is None:
                self._keep(f"profile {profile.name!r}: the {kind} {ref!r} is not registered here")
                return
        store_profile(self._connection, profile)
        self.done.profiles += 1

    def _keep(self, what: str) -> None:
        self.done.kept.append(what)


def _rows(spool: Path) -> Iterator[tuple[str, dict[str, Any], int]]:
    with spool.open(encoding="utf-8") as stream:
        for line, text in enumerate(stream, start=1):
            try:
                row = json.loads(text)
                what = row.pop("row")
            except (ValueError, KeyError, AttributeError, TypeError) as error:
                raise damaged(f"line {line} of its catalogue cannot be read ({error})") from error
            yield what, row, line


def _parsed(row: dict[str, Any], line: int) -> ArtefactRow:
    try:
        return ArtefactRow.model_validate(row)
    except ValidationError as error:
        raise damaged(f"line {line} of its catalogue cannot be read ({error})") from error
