"""Profiles: steering specs under a name, and the artefacts a profile refers to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import ColumnElement, Connection, delete, select

from steer.artefacts.arming import ArmedDetectors
from steer.errors import UnknownArtefact
from steer.model import bare_name
from steer.references import Reference, put_at, references_in
from steer.registry.catalogue.aliases import Alias, stored_aliases
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.catalogue.model_view import EVERY_MODEL, ModelView
from steer.registry.catalogue.schema import profiles
from steer.registry.entry import Entry, Ref, parse_ref
from steer.spec import SteeringSpec, check_name


class Profile(BaseModel):
    """A steering spec that clients use by its name, as `model: "<model>:<name>"`, and the detectors
    that watch whoever does.

    Its own `model` is the one that it was saved for, without folder or organisation; None where it
    serves every model. Each model may have a profile of the same name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(check_name)]
    spec: SteeringSpec
    # Written only where there are any, so that older versions read what does without.
    detectors: ArmedDetectors = Field(default=(), exclude_if=lambda value: not value)
    description: Annotated[str, Field(max_length=4096)] = ""
    model: Annotated[str, Field(min_length=1, max_length=512), AfterValidator(bare_name)] | None = (
        None
    )


def references(profile: Profile) -> Iterator[Reference]:
    """Every registered artefact that `profile` names; inline vectors are not registered."""
    return (reference for reference in references_in(profile) if reference.name is not None)


def pinned(profile: Profile, exact: Callable[[Reference], str]) -> Profile:
    """`profile` with every reference replaced by `exact` of it, such as `name@hash`."""
    document = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    for reference in references(profile):
        put_at(document, reference.param, exact(reference))
    return Profile.model_validate(document)


def save_profile(catalogue: Catalogue, profile: Profile, *, pin: bool) -> Profile:
    """Stores a profile, in place of one with the same name and model; as it was stored.

    It is for the model whose view this is, unless it names its own. With `pin`, names in it
    become `name@hash` of what they mean now. Raises `UnknownArtefact` for what is not registered.
    """
    if profile.model is None:
        profile = profile.model_copy(update={"model": catalogue.view.own_name})
    with catalogue.writing() as connection:
        exact: dict[Reference, str] = {}
        for reference in references(profile):
            kind, ref, param = reference
            entry = catalogue.find(connection, kind, parse_ref(kind, ref))
            if entry is None:
                raise catalogue.unknown(connection, kind, ref).at(param)
            exact[reference] = entry.id
        if pin:
            profile = pinned(profile, exact.__getitem__)
        store_profile(connection, profile)
    return profile


def find_profile(catalogue: Catalogue, name: str) -> Profile:
    """The profile called `name` of the model whose view this is; where it has none, the one for
    every model; and only where there is none either, another model's.

    Raises `UnknownArtefact` (`unknown_profile`).
    """
    view = catalogue.view
    with catalogue.reading() as connection:
        named = _read(connection, profiles.c.name == name)
        if not named:
            raise unknown_profile(connection, view, name)
    if view.everyones:
        return min(named, key=lambda one: one.model is not None)
    return min(named, key=lambda one: (not view.holds(one.model), one.model is None))


def profiles_for(catalogue: Catalogue, model: str | None) -> list[Profile]:
    """The profiles that serve the model whose view this is, by name; or those saved for `model`;
    or where that is `EVERY_MODEL`, all."""
    view = catalogue.view
    with catalogue.reading() as connection:
        stored = stored_profiles(connection)
        if model == EVERY_MODEL:
            return stored
        if model is not None:
            return [one for one in stored if one.model in view.names_of(model)]
        if view.everyones:
            return stored
        own = {one.name for one in stored if one.model and view.holds(one.model)}
        return [
            one
            for one in stored
            if view.holds(one.model)
            and (one.model or one.name not in own)
            and _can_serve(catalogue, connection, one)
        ]


def _can_serve(catalogue: Catalogue, connection: Connection, profile: Profile) -> bool:
    """False for a profile whose every use would be refused: by what it names, which is of another
    model's shape."""
    for kind, ref, _ in references(profile):
        entry = catalogue.find(connection, kind, parse_ref(kind, ref))
        if entry is None or not catalogue.view.can_use(entry.card):
            return False
    return True


def stored_profile(connection: Connection, name: str, model: str | None) -> Profile | None:
    """The profile called `name` that was saved for `model`, or for every one."""
    found = _read(connection, profiles.c.name == name, profiles.c.model == (model or ""))
    return found[0] if found else None


def stored_profiles(connection: Connection) -> list[Profile]:
    """All profiles by name, and by model."""
    return _read(connection)


def _read(connection: Connection, *which: ColumnElement[bool]) -> list[Profile]:
    query = select(profiles.c.profile).where(*which).order_by(profiles.c.name, profiles.c.model)
    return [Profile.model_validate_json(text) for text in connection.execute(query).scalars()]


def store_profile(connection: Connection, profile: Profile) -> None:
    """Writes the profile, in the place of one with the same name and model."""
    text = profile.model_dump_json(by_alias=True, exclude_none=True)
    key = {"name": profile.name, "model": profile.model or ""}
    connection.execute(delete(profiles).where(*(profiles.c[c] == key[c] for c in key)))
    connection.execute(profiles.insert().values(**key, profile=text))


def delete_profiles(catalogue: Catalogue, name: str) -> None:
    """Removes the profile called `name` that the model has and the one for every model; in nobody's
    view, those of all models. Raises `UnknownArtefact`, also where only other models have one."""
    view = catalogue.view
    gone = delete(profiles).where(profiles.c.name == name)
    if not view.everyones:
        gone = gone.where(profiles.c.model.in_(("", *view.names)))
    with catalogue.writing() as connection:
        if connection.execute(gone).rowcount == 0:
            raise unknown_profile(connection, view, name)


def unknown_profile(connection: Connection, view: ModelView, name: str) -> UnknownArtefact:
    """The error for a profile that is not there, with the names it may have meant: those that the
    model whose `view` this is has."""
    stored = connection.execute(select(profiles.c.name, profiles.c.model)).all()
    others = sorted(row.model for row in stored if row.name == name)
    names = sorted({row.name for row in stored if view.holds(row.model)})
    near = difflib.get_close_matches(name, names, n=3) or names[:5]
    if others:
        hint = f"the one there is serves {', '.join(map(repr, others))}, not this model"
    elif near:
        hint = f"did you mean {', '.join(map(repr, near))}?"
    else:
        hint = "none is stored"
    return UnknownArtefact(f"there is no profile named {name!r}; {hint}", code="unknown_profile")


class Users(NamedTuple):
    """Who needs an artefact: names of aliases and of profiles."""

    aliases: list[str]
    profiles: list[str]

    def __str__(self) -> str:
        named = {"aliases": self.aliases, "profiles": self.profiles}
        return " and ".join(f"the {what} {', '.join(who)}" for what, who in named.items() if who)


def users_of(
    connection: Connection, view: ModelView, removed: Sequence[Entry], kept: Sequence[Entry]
) -> Users:
    """The aliases and profiles that would name nothing if of a name's versions `removed` went and
    `kept` stayed; or, of a model for which there is a version, nothing for that one."""
    kind, name = removed[0].kind, removed[0].name
    pointing = {alias.name: alias for alias in stored_aliases(connection, kind, name)}

    def breaks(ref: Ref, model: str | None = None) -> bool:
        meant = pointing[ref.name].applied(ref) if ref.name in pointing else ref
        if meant is None or meant.name != name:
            return False
        if meant.newest:
            models = {model} if model else {entry.card.model for entry in removed}
            served = (ModelView(view.names_of(one)) for one in models if one)
            return not kept or any(_is_lost(one, removed, kept) for one in served)
        return _holds(removed, meant) and not _holds(kept, meant)

    return Users(
        [alias for alias in pointing if breaks(Ref(alias))],
        [
            profile.name
            for profile in stored_profiles(connection)
            if any(
                reference.kind == kind and breaks(parse_ref(kind, reference.ref), profile.model)
                for reference in references(profile)
            )
        ],
    )


def _is_lost(view: ModelView, removed: Sequence[Entry], kept: Sequence[Entry]) -> bool:
    """Whether a model has a version among `removed` and none among `kept`."""
    return any(view.is_for(entry.card) for entry in removed) and not any(
        view.is_for(entry.card) for entry in kept
    )


def _holds(entries: Sequence[Entry], ref: Ref) -> bool:
    return any(entry.sha256.startswith(ref.hash_prefix) for entry in entries)


def profiles_naming(connection: Connection, alias: Alias) -> list[tuple[str, Ref]]:
    """The profiles that use the alias, each with how."""
    return [
        (profile.name, ref)
        for profile in stored_profiles(connection)
        for reference in references(profile)
        if reference.kind == alias.kind
        and (ref := parse_ref(alias.kind, reference.ref)).name == alias.name
    ]
