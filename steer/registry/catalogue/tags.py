"""Tags: words on a name, for finding it. They belong to the name, not to a version."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, delete, select

from steer.artefacts.kinds import ArtefactKind
from steer.errors import SteerError
from steer.registry.catalogue.batches import batched
from steer.registry.catalogue.schema import tags

MAX_TAGS = 64
_NAMES_AT_ONCE = 500
TAG = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:+-]{0,63}")


def check_tag(tag: str) -> str:
    """`tag` as one that can be stored; raises `SteerError` (`invalid_tag`)."""
    if not TAG.fullmatch(tag):
        raise SteerError(
            f"{tag[:80]!r} is not a tag: up to 64 letters, digits, '.', '_', ':', '+' and '-', the "
            "first a letter or digit",
            code="invalid_tag",
            param="/tags",
        )
    return tag


def stored_tags(connection: Connection, kind: ArtefactKind, name: str) -> tuple[str, ...]:
    """The tags of a name, in order."""
    query = select(tags.c.tag).where(tags.c.kind == kind, tags.c.name == name)
    return tuple(connection.execute(query.order_by(tags.c.tag)).scalars())


def tags_of_names(
    connection: Connection, kind: ArtefactKind, names: Sequence[str]
) -> dict[str, tuple[str, ...]]:
    """The tags of several names; names without tags are left out."""
    found: dict[str, tuple[str, ...]] = {}
    for batch in batched(names, _NAMES_AT_ONCE):
        query = select(tags.c.name, tags.c.tag).where(tags.c.kind == kind, tags.c.name.in_(batch))
        for row in connection.execute(query.order_by(tags.c.name, tags.c.tag)):
            found[row.name] = (*found.get(row.name, ()), row.tag)
    return found


def store_tags(
    connection: Connection, kind: ArtefactKind, name: str, wanted: Iterable[str]
) -> tuple[str, ...]:
    """Gives the name exactly the tags `wanted`; they are returned in order.

    Raises `SteerError` (`invalid_tag`) for what is no tag, and for too many.
    """
    chosen = tuple(sorted({check_tag(tag) for tag in wanted}))
    if len(chosen) > MAX_TAGS:
        raise SteerError(
            f"{name!r} would have {len(chosen)} tags: give it at most {MAX_TAGS}",
            code="invalid_tag",
            param="/tags",
        )
    delete_tags(connection, kind, name)
    if chosen:
        connection.execute(
            tags.insert(), [{"kind": kind, "name": name, "tag": tag} for tag in chosen]
        )
    return chosen


def add_card_tags(
    connection: Connection, kind: ArtefactKind, name: str, given: Sequence[str]
) -> None:
    """Adds the tags on a new version's card, as far as they are tags; cards hold any text."""
    fitting = {tag for tag in given if TAG.fullmatch(tag)}
    if not fitting:
        return
    held = stored_tags(connection, kind, name)
    added = sorted(fitting - set(held))[: max(0, MAX_TAGS - len(held))]
    if added:
        store_tags(connection, kind, name, (*held, *added))


def delete_tags(connection: Connection, kind: ArtefactKind, name: str) -> None:
    """Takes all tags off a name."""
    connection.execute(delete(tags).where(tags.c.kind == kind, tags.c.name == name))
