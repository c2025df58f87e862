"""Garbage collection: what was removed long enough ago goes for good, and its blobs with it.

There is no lock beside the catalogue's own. A blob is deleted inside a writing transaction that has
just seen that nothing needs it; a writer looks, inside the transaction that catalogues a blob, that
it is there, and sends it again where it is not. So whichever of the two comes first, no row is
committed without its blob. A row is given up in a transaction of its own before: what can be
listed as removed can be restored.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from sqlalchemy import Connection, delete, exists, func, select, update

from steer.registry.blobs.blobs import BlobStore
from steer.registry.blobs.leases import Leases
from steer.registry.catalogue.aliases import stored_aliases
from steer.registry.catalogue.batches import batched
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.catalogue.schema import artefacts, tags
from steer.registry.entry import parse_ref
from steer.registry.profiles import references, stored_profiles

GRACE_SECONDS = 7 * 24 * 3600.0
"""How long what was removed can be restored, unless another time is given."""

ORPHAN_SECONDS = 3600.0
"""How old a blob without a row must be: a younger one may be an upload on its way."""

_BATCH = 16
"""Contents in one transaction: writers wait for it, and one for each would be many."""


@dataclass(frozen=True)
class Garbage:
    """What a collection did, or would do. `versions` are rows that can no longer be restored,
    `blobs` and `bytes` what was deleted, `leased` contents kept because a process uses them."""

    versions: int
    blobs: int
    bytes: int
    leased: int
    plans: int
    dry_run: bool


@dataclass
class _Tally:
    versions: int = 0
    blobs: int = 0
    bytes: int = 0
    leased: int = 0


def collect(
    catalogue: Catalogue, blobs: BlobStore, leases: Leases, *, grace_seconds: float, dry_run: bool
) -> Garbage:
    """Gives up what was removed more than `grace_seconds` ago, and deletes blobs nothing needs."""
    tally = _Tally()
    now = datetime.now(UTC).replace(tzinfo=None)
    cutoff = now - timedelta(seconds=grace_seconds)
    with catalogue.reading() as connection:
        expired = _expired(connection, cutoff)
        sizes = _sizes(connection, expired)
    if dry_run:
        _preview(catalogue, blobs, leases, expired, sizes, tally)
    else:
        for batch in batched(expired, _BATCH):
            _give_up(catalogue, leases, batch, cutoff, tally)
        if tally.versions:
            _drop_tags(catalogue)
        tally.blobs, tally.bytes = remove_orphans(catalogue, blobs, leases, min_age=ORPHAN_SECONDS)
    return Garbage(tally.versions, tally.blobs, tally.bytes, tally.leased, plans=0, dry_run=dry_run)


def remove_orphans(
    catalogue: Catalogue, blobs: BlobStore, leases: Leases, *, min_age: float
) -> tuple[int, int]:
    """Deletes blobs that no row needs, nobody leases, and that were given up or are `min_age`
    seconds old; how many, and their bytes as far as rows tell."""
    count = size = 0
    for batch in batched(_suspects(catalogue, blobs), _BATCH):
        with catalogue.writing() as connection:
            sizes = _sizes(connection, batch)
            for sha256 in _unneeded(connection, batch):
                if leases.is_held(sha256):
                    continue
                if sha256 not in sizes and min_age and blobs.age(sha256) < min_age:
                    continue
                blobs.remove(sha256)
                leases.drop(sha256)
                count, size = count + 1, size + sizes.get(sha256, 0)
    return count, size


def _suspects(catalogue: Catalogue, blobs: BlobStore) -> list[str]:
    """Blobs that no row needed a moment ago."""
    found: list[str] = []
    with catalogue.reading() as connection:
        for batch in batched(blobs.names(), 500):
            found += _unneeded(connection, batch)
    return found


def _unneeded(connection: Connection, hashes: Sequence[str]) -> list[str]:
    query = select(artefacts.c.sha256).where(
        artefacts.c.purged_at.is_(None), artefacts.c.sha256.in_(hashes)
    )
    needed = set(connection.execute(query).scalars())
    return [sha256 for sha256 in hashes if sha256 not in needed]


def _expired(
    connection: Connection, cutoff: datetime, among: Sequence[str] | None = None
) -> list[str]:
    """Contents whose every version was removed before `cutoff`, and that no name is pinned to."""
    needing = artefacts.alias()
    needed = exists().where(
        needing.c.sha256 == artefacts.c.sha256,
        needing.c.purged_at.is_(None),
        needing.c.removed_at.is_(None) | (needing.c.removed_at > cutoff),
    )
    query = (
        select(artefacts.c.sha256)
        .where(artefacts.c.removed_at <= cutoff, artefacts.c.purged_at.is_(None), ~needed)
        .distinct()
        .order_by(artefacts.c.sha256)
    )
    if among is not None:
        query = query.where(artefacts.c.sha256.in_(among))
    found = list(connection.execute(query).scalars())
    prefixes = tuple(_pins(connection)) if found else ()
    return [sha256 for sha256 in found if not sha256.startswith(prefixes)]


def _pins(connection: Connection) -> Iterator[str]:
    """Beginnings of hashes in aliases and profiles. Removal refuses what they name, so that there
    is nothing to find here unless somebody has changed the tables by hand."""
    for alias in stored_aliases(connection):
        if alias.sha256 is not None:
            yield alias.sha256
    for profile in stored_profiles(connection):
        for reference in references(profile):
            ref = parse_ref(reference.kind, reference.ref)
            if ref.hash_prefix:
                yield ref.hash_prefix


def _sizes(connection: Connection, hashes: Sequence[str]) -> dict[str, int]:
    found: dict[str, int] = {}
    for batch in batched(hashes, 500):
        query = select(artefacts.c.sha256, artefacts.c.size_bytes).where(
            artefacts.c.sha256.in_(batch)
        )
        found.update({row.sha256: row.size_bytes for row in connection.execute(query)})
    return found


def _give_up(
    catalogue: Catalogue, leases: Leases, batch: Sequence[str], cutoff: datetime, tally: _Tally
) -> None:
    now = datetime.now(UTC).replace(tzinfo=None)
    with catalogue.writing() as connection:
        still = set(_expired(connection, cutoff, batch))  # something may have been restored
        for sha256 in batch:
            if sha256 not in still:
                continue
            if leases.is_held(sha256):
                tally.leased += 1
                continue
            rows = artefacts.c.sha256 == sha256, artefacts.c.purged_at.is_(None)
            given_up = update(artefacts).where(*rows).values(purged_at=now)
            tally.versions += connection.execute(given_up).rowcount


def _drop_tags(catalogue: Catalogue) -> None:
    """Takes the tags off names that have nothing left to restore."""
    left = exists().where(
        artefacts.c.kind == tags.c.kind,
        artefacts.c.name == tags.c.name,
        artefacts.c.purged_at.is_(None),
    )
    with catalogue.writing() as connection:
        connection.execute(delete(tags).where(~left))


def _preview(
    catalogue: Catalogue,
    blobs: BlobStore,
    leases: Leases,
    expired: Sequence[str],
    sizes: dict[str, int],
    tally: _Tally,
) -> None:
    with catalogue.reading() as connection:
        for sha256 in expired:
            if leases.is_held(sha256):
                tally.leased += 1
                continue
            count = select(func.count()).where(
                artefacts.c.sha256 == sha256, artefacts.c.purged_at.is_(None)
            )
            tally.versions += int(connection.execute(count).scalar_one())
            tally.blobs += 1
            tally.bytes += sizes[sha256]
    for sha256 in _suspects(catalogue, blobs):
        with catalogue.reading() as connection:
            known = _sizes(connection, [sha256])
        if leases.is_held(sha256) or (not known and blobs.age(sha256) < ORPHAN_SECONDS):
            continue
        tally.blobs += 1
        tally.bytes += known.get(sha256, 0)
