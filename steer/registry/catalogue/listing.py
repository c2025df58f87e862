"""Finding artefacts: by text, kind, model, width and tag, a page at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, exists, or_, select

from steer.artefacts.kinds import ArtefactKind
from steer.registry.catalogue.catalogue import entry_of
from steer.registry.catalogue.schema import artefacts, tags
from steer.registry.entry import Entry


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
    newer = artefacts.alias()
    # An index has this order, so that a page costs a page, however many names there are.
    outdated = exists().where(
        _alive(newer, search.deleted),
        newer.c.kind == artefacts.c.kind,
        newer.c.name == artefacts.c.name,
        newer.c.version > artefacts.c.version,
    )
    query = select(artefacts).where(
        _alive(artefacts, search.deleted), ~outdated, *_conditions(search)
    )
    query = query.order_by(artefacts.c.kind, artefacts.c.name).limit(limit).offset(offset)
    return [entry_of(row) for row in connection.execute(query).mappings()]


def _alive(rows: FromClause, deleted: bool) -> ColumnElement[bool]:
    if deleted:
        return rows.c.removed_at.is_not(None) & rows.c.purged_at.is_(None)
    return rows.c.removed_at.is_(None)


def _conditions(search: Search) -> list[ColumnElement[bool]]:
    conditions: list[ColumnElement[bool]] = []
    if search.kind is not None:
        conditions.append(artefacts.c.kind == search.kind)
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
