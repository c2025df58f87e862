"""Finding artefacts: by text, kind, model, width and tag, a page at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, exists, func, or_, select

from steer.control_vector import ArtefactKind
from steer.registry.catalogue import entry_of
from steer.registry.entry import Entry
from steer.registry.schema import artefacts, tags


@dataclass(frozen=True)
class Search:
    """What to look for. `text` is part of a name, a description or a tag, in any case; all that is
    given must fit. `deleted` looks among what was removed and can be restored, instead of among
    what is live."""

    kind: ArtefactKind | None = None
    text: str | None = None
    model: str | None = None
    width: int | None = None
    tag: str | None = None
    deleted: bool = False


def found_entries(
    connection: Connection, search: Search, *, limit: int, offset: int
) -> list[Entry]:
    """The newest fitting version of each name, by kind and name."""
    newest = select(func.max(artefacts.c.id)).where(_alive(search.deleted))
    if search.kind is not None:
        newest = newest.where(artefacts.c.kind == search.kind)
    newest = newest.group_by(artefacts.c.kind, artefacts.c.name)
    query = select(artefacts).where(artefacts.c.id.in_(newest), *_conditions(search))
    query = query.order_by(artefacts.c.kind, artefacts.c.name).limit(limit).offset(offset)
    return [entry_of(row) for row in connection.execute(query).mappings()]


def _alive(deleted: bool) -> ColumnElement[bool]:
    if deleted:
        return artefacts.c.removed_at.is_not(None) & artefacts.c.purged_at.is_(None)
    return artefacts.c.removed_at.is_(None)


def _conditions(search: Search) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if search.model is not None:
        conditions.append(artefacts.c.model == search.model)
    if search.width is not None:
        conditions.append(artefacts.c.width == search.width)
    if search.tag is not None:
        conditions.append(_tagged(tags.c.tag == search.tag))
    if search.text:
        like = "%" + _literal(search.text) + "%"
        columns: list[Any] = [artefacts.c.name, artefacts.c.description]
        conditions.append(
            or_(
                *(column.ilike(like, escape="\\") for column in columns),
                _tagged(tags.c.tag.ilike(like, escape="\\")),
            )
        )
    return conditions


def _tagged(condition: ColumnElement[bool]) -> ColumnElement[bool]:
    return exists().where(
        tags.c.kind == artefacts.c.kind, tags.c.name == artefacts.c.name, condition
    )


def _literal(text: str) -> str:
    return text.replace("\\", "\\\\").replace("%", "\\%").replace("_", "\\_")
