"""Finding artefacts: by text, kind, model, width and tag, a page at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sqlalchemy import ColumnElement, Connection, FromClause, exists, or_, select

from steer.artefacts.kinds import ArtefactKind
from steer.registry.catalogue.catalogue import entry_of
from steer.registry.catalogue.model_view import EVERY_MODEL, EVERYONE, ModelView
from steer.registry.catalogue.schema import artefacts, tags
from steer.registry.entry import Entry


@dataclass(frozen=True)
class Search:
    """What to look for. `text` is part of a name, a description or a tag, in any case; all that is
    given must fit. `model` is one that cards name, or `EVERY_MODEL`; without it, names that are
    another model's alone are left out. `deleted` looks among what was removed and can be restored,
    instead of among what is live."""

    kind: ArtefactKind | None = None
    text: str | None = None
    model: str | None = None
    width: int | None = None
    tag: str | None = None
    deleted: bool = False


def found_entries(
    connection: Connection, view: ModelView, search: Search, *, limit: int, offset: int
) -> list[Entry]:
    """The version that counts for `view` of each name, where it fits, by kind and name.

    Where a model is asked for, the newest version whose card names that one.
    """
    others = artefacts.alias()
    # An index has this order, so that a page costs a page, however many names there are.
    outdated = exists().where(
        _alive(others, search.deleted),
        others.c.kind == artefacts.c.kind,
        others.c.name == artefacts.c.name,
    )
    shown: ColumnElement[bool] | None = None
    if search.model is None or search.model == EVERY_MODEL:
        outdated = outdated.where(view.is_better(others, artefacts))
        shown = view.is_listed(artefacts) if search.model is None else None
    else:
        names = view.names_of(search.model)
        outdated = outdated.where(others.c.model.in_(names), EVERYONE.is_better(others, artefacts))
        shown = artefacts.c.model.in_(names)
    query = select(artefacts).where(
        _alive(artefacts, search.deleted), ~outdated, *_conditions(search)
    )
    if shown is not None:
        query = query.where(shown)
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
