"""What changes names: removal, restoring, aliases and tags. Each function is one transaction."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from sqlalchemy import Connection

from steer.artefacts.kinds import ArtefactKind
from steer.errors import Conflict, SteerError, StorageError, UnknownArtefact
from steer.registry.blobs.blobs import BlobStore
from steer.registry.catalogue.aliases import (
    Alias,
    delete_alias,
    store_alias,
    stored_alias,
    unknown_alias,
)
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.catalogue.model_view import ModelView
from steer.registry.catalogue.tags import check_tag, store_tags, stored_tags
from steer.registry.entry import Entry, Ref, parse_ref
from steer.registry.profiles import profiles_naming, users_of


def remove(catalogue: Catalogue, kind: ArtefactKind, ref: str) -> Entry:
    """Removes a name with all its versions for the model whose view this is, or with `name@hash`
    only that content.

    Returns the newest entry removed. Raises `Conflict` while a profile or an alias needs it.
    """
    parsed = parse_ref(kind, ref)
    with catalogue.writing() as connection:
        live = catalogue.versions(connection, kind, parsed.name)
        gone = _meant(catalogue.view, live, parsed)
        if not gone:
            _refuse_alias(connection, kind, parsed)
            _refuse_other_models(catalogue, kind, parsed, live, "removed")
            raise catalogue.unknown(connection, kind, ref)
        removed = {entry.sha256 for entry in gone}
        kept = [entry for entry in live if entry.sha256 not in removed]
        users = users_of(connection, catalogue.view, gone, kept)
        if users.aliases or users.profiles:
            raise Conflict(
                f"the {kind} {ref!r} is used by {users}: change or remove them first",
                code="in_use",
            )
        catalogue.mark_removed(connection, gone)
        return gone[0]


def _meant(view: ModelView, entries: Sequence[Entry], ref: Ref) -> list[Entry]:
    """Those of a name's versions that `ref` means all together: with this hash, or for the model.

    Never what is another model's alone, though the bare name is found by it: removing a name twice
    would remove theirs.
    """
    if ref.newest:
        return [entry for entry in entries if view.is_for(entry.card)]
    return [entry for entry in entries if entry.sha256.startswith(ref.hash_prefix)]


def _refuse_other_models(
    catalogue: Catalogue, kind: ArtefactKind, ref: Ref, entries: Sequence[Entry], done: str
) -> None:
    """Raises `UnknownArtefact` where a bare name has versions, but none for this model."""
    if not (ref.newest and entries):
        return
    listed = ", ".join(f"{entry.id} ({entry.card.model or 'no model'})" for entry in entries[:5])
    raise UnknownArtefact(
        f"the {kind} {ref.name!r} has no version for {catalogue.view.own_name!r} that can be "
        f"{done}, but for other models: {listed}. Name one exactly",
        code=f"unknown_{kind}",
    )


def _refuse_alias(connection: Connection, kind: ArtefactKind, ref: Ref) -> None:
    """A removal by an alias could mean the alias or what it stands for."""
    alias = stored_alias(connection, kind, ref.name)
    if alias is not None:
        raise Conflict(
            f"{ref.name!r} is an alias for the {kind} {alias.ref!r}: remove the alias as an alias, "
            "or the artefact by its own name",
            code="is_alias",
        )


def restore(catalogue: Catalogue, blobs: BlobStore, kind: ArtefactKind, ref: str) -> Entry:
    """Brings back a name with all its versions for this model that are still there, or
    `name@hash` alone.

    Returns the newest entry restored. Raises `UnknownArtefact` where nothing can be restored,
    `Conflict` where the name has become an alias.
    """
    parsed = parse_ref(kind, ref)
    with catalogue.writing() as connection:
        removed = catalogue.removed(connection, kind, parsed)
        back = _meant(catalogue.view, removed, parsed)
        if not back:
            _refuse_other_models(catalogue, kind, parsed, removed, "restored")
            raise _nothing_to_restore(catalogue, connection, kind, parsed, ref)
        catalogue.check_free(connection, kind, parsed.name)
        for entry in back:
            if not blobs.holds(entry.sha256, entry.size_bytes):
                raise StorageError(
                    f"{entry.id!r} cannot be restored: its blob is missing. Upload it again",
                    code="missing_blob",
                )
        catalogue.mark_removed(connection, back, removed=False)
        newest = catalogue.find_named(connection, kind, Ref(parsed.name, back[0].sha256))
        assert newest is not None  # it was just restored
        return newest


def _nothing_to_restore(
    catalogue: Catalogue, connection: Connection, kind: ArtefactKind, parsed: Ref, ref: str
) -> UnknownArtefact:
    if catalogue.find_named(connection, kind, parsed) is not None:
        why = "it is not removed"
    elif catalogue.last_version(connection, kind, parsed.name):
        why = "what was removed has been collected; upload it again"
    else:
        why = "there was never one of this name"
    return UnknownArtefact(f"no {kind} {ref!r} can be restored: {why}", code=f"unknown_{kind}")


def set_alias(catalogue: Catalogue, kind: ArtefactKind, name: str, target: str) -> Alias:
    """Makes `name` stand for `target`, a name or `name@hash`; an alias of that name is moved.

    Raises `UnknownArtefact` for a target that is not registered, `Conflict` for the name of an
    artefact, for the alias of an alias, and where a profile would lose what it names.
    """
    parsed = parse_ref(kind, target)
    with catalogue.writing() as connection:
        entry = catalogue.find_named(connection, kind, parsed)
        if entry is None:
            if stored_alias(connection, kind, parsed.name) is not None:
                raise Conflict(
                    f"{parsed.name!r} is an alias itself: give the artefact's own name",
                    code="is_alias",
                    param="/target",
                )
            raise catalogue.unknown(connection, kind, target).at("/target")
        taken = catalogue.last_version(connection, kind, name)
        if taken:
            raise Conflict(
                f"{name!r} is the name of a {kind} (removed ones count, for they can be "
                "restored): choose another name",
                code="name_taken",
                param="/name",
            )
        alias = Alias(kind, name, entry.name, None if parsed.newest else entry.sha256)
        store_alias(connection, alias)
        for profile, ref in profiles_naming(connection, alias):
            if catalogue.find(connection, kind, ref) is None:
                raise Conflict(
                    f"the profile {profile!r} uses {name}@{ref.hash_prefix}, which {target!r} is "
                    "not: change the profile first",
                    code="in_use",
                )
        return alias


def unset_alias(catalogue: Catalogue, kind: ArtefactKind, name: str) -> Alias:
    """Removes an alias. Raises `UnknownArtefact`, or `Conflict` while a profile uses it."""
    with catalogue.writing() as connection:
        alias = stored_alias(connection, kind, name)
        if alias is None:
            raise unknown_alias(kind, name)
        users = sorted({profile for profile, _ in profiles_naming(connection, alias)})
        if users:
            raise Conflict(
                f"the alias {name!r} is used by the profiles {', '.join(users)}: change or remove "
                "them first",
                code="in_use",
            )
        delete_alias(connection, kind, name)
        return alias


def change_tags(
    catalogue: Catalogue,
    kind: ArtefactKind,
    name: str,
    *,
    add: Iterable[str] = (),
    remove: Iterable[str] = (),
) -> tuple[str, ...]:
    """Puts tags on a name and takes others off; the tags it has then. Both may be done twice.

    Raises `UnknownArtefact`, or `SteerError` (`invalid_tag`).
    """
    parsed = parse_ref(kind, name)
    added, taken = {check_tag(tag) for tag in add}, {check_tag(tag) for tag in remove}
    if both := added & taken:
        raise SteerError(
            f"the tag {min(both)!r} is to be set and unset at once: choose one",
            code="invalid_tag",
            param="/tags",
        )
    with catalogue.writing() as connection:
        entry = catalogue.find(connection, kind, parsed)
        if entry is None:
            raise catalogue.unknown(connection, kind, name)
        held = stored_tags(connection, kind, entry.name)
        return store_tags(connection, kind, entry.name, (set(held) | added) - taken)
