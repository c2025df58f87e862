"""Aliases: names that stand for another name, or for one version of it."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, delete, select

from steer.artefacts.kinds import ArtefactKind
from steer.errors import UnknownArtefact
from steer.registry.catalogue.schema import aliases
from steer.registry.entry import Ref


@dataclass(frozen=True)
class Alias:
    """`name` stands for the artefact `target`: for its newest version, or where there is a
    `sha256` for the one with that content."""

    kind: ArtefactKind
    name: str
    target: str
    sha256: str | None = None

    @property
    def ref(self) -> str:
        """What the alias stands for, as a reference."""
        return self.target if self.sha256 is None else f"{self.target}@{self.sha256[:12]}"

    def applied(self, ref: Ref) -> Ref | None:
        """What `ref`, whose name is this alias, means; None where the hashes contradict."""
        if self.sha256 is None:
            return Ref(self.target, ref.hash_prefix)
        return Ref(self.target, self.sha256) if self.sha256.startswith(ref.hash_prefix) else None


def stored_alias(connection: Connection, kind: ArtefactKind, name: str) -> Alias | None:
    """The alias called `name`."""
    query = select(aliases).where(aliases.c.kind == kind, aliases.c.name == name)
    row = connection.execute(query).mappings().first()
    return Alias(**row) if row else None


def stored_aliases(
    connection: Connection, kind: ArtefactKind | None = None, target: str | None = None
) -> list[Alias]:
    """All aliases by kind and name, or those of one kind, or for one artefact."""
    query = select(aliases).order_by(aliases.c.kind, aliases.c.name)
    if kind is not None:
        query = query.where(aliases.c.kind == kind)
    if target is not None:
        query = query.where(aliases.c.target == target)
    return [Alias(**row) for row in connection.execute(query).mappings()]


def store_alias(connection: Connection, alias: Alias) -> None:
    """Writes the alias, in the place of one with the same name."""
    delete_alias(connection, alias.kind, alias.name)
    connection.execute(
        aliases.insert().values(
            kind=alias.kind, name=alias.name, target=alias.target, sha256=alias.sha256
        )
    )


def delete_alias(connection: Connection, kind: ArtefactKind, name: str) -> bool:
    """Whether there was one."""
    gone = delete(aliases).where(aliases.c.kind == kind, aliases.c.name == name)
    return connection.execute(gone).rowcount > 0


def unknown_alias(kind: ArtefactKind, name: str) -> UnknownArtefact:
    """The error for an alias that is not there."""
    return UnknownArtefact(f"there is no alias {name!r} for a {kind}", code="unknown_alias")
