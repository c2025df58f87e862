"""Profiles: steering specs under a name, and the artefacts a spec refers to."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import Connection, delete, select, update

from steer.artefacts.kinds import ArtefactKind
from steer.errors import UnknownArtefact
from steer.references import Reference, put_at
from steer.registry.catalogue.aliases import Alias, stored_aliases
from steer.registry.catalogue.schema import profiles
from steer.registry.entry import Ref, parse_ref
from steer.spec import SteeringSpec, check_name, parse_spec


class Profile(BaseModel):
    """A steering spec that clients use by its name, as `model: "<model>:<name>"`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(check_name)]
    spec: SteeringSpec
    description: Annotated[str, Field(max_length=4096)] = ""


def references(spec: SteeringSpec) -> Iterator[Reference]:
    """Every registered artefact that `spec` names; inline vectors are not registered."""
    return (reference for reference in spec.references() if reference.name is not None)


def pinned(spec: SteeringSpec, exact: Callable[[Reference], str]) -> SteeringSpec:
    """`spec` with every reference replaced by `exact` of it, such as `name@hash`."""
    document = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    for reference in references(spec):
        put_at(document, reference.param, exact(reference))
    return parse_spec(document)


def stored_profile(connection: Connection, name: str) -> Profile | None:
    query = select(profiles.c.profile).where(profiles.c.name == name)
    text = connection.execute(query).scalar()
    return Profile.model_validate_json(text) if text is not None else None


def stored_profiles(connection: Connection) -> list[Profile]:
    """All profiles by name."""
    query = select(profiles.c.profile).order_by(profiles.c.name)
    return [Profile.model_validate_json(text) for text in connection.execute(query).scalars()]


def store_profile(connection: Connection, profile: Profile) -> None:
    """Writes the profile, in the place of one with the same name."""
    text = profile.model_dump_json(by_alias=True, exclude_none=True)
    changed = update(profiles).where(profiles.c.name == profile.name).values(profile=text)
    if connection.execute(changed).rowcount == 0:
        connection.execute(profiles.insert().values(name=profile.name, profile=text))


def delete_profile(connection: Connection, name: str) -> bool:
    """Whether there was one."""
    return connection.execute(delete(profiles).where(profiles.c.name == name)).rowcount > 0


def unknown_profile(connection: Connection, name: str) -> UnknownArtefact:
    """The error for a profile that is not there, with the names it may have meant."""
    names = list(connection.execute(select(profiles.c.name).order_by(profiles.c.name)).scalars())
    near = difflib.get_close_matches(name, names, n=3) or names[:5]
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "none is stored"
    return UnknownArtefact(f"there is no profile named {name!r}; {hint}", code="unknown_profile")


class Users(NamedTuple):
    """Who needs an artefact: names of aliases and of profiles."""

    aliases: list[str]
    profiles: list[str]

    def __str__(self) -> str:
        named = {"aliases": self.aliases, "profiles": self.profiles}
        return " and ".join(f"the {what} {', '.join(who)}" for what, who in named.items() if who)


def users_of(
    connection: Connection,
    kind: ArtefactKind,
    name: str,
    removed: AbstractSet[str],
    kept: AbstractSet[str],
) -> Users:
    """The aliases and profiles that would name nothing if `removed` hashes went and `kept`
    stayed."""
    pointing = {alias.name: alias for alias in stored_aliases(connection, kind, name)}

    def breaks(ref: Ref) -> bool:
        meant = pointing[ref.name].applied(ref) if ref.name in pointing else ref
        return (
            meant is not None
            and meant.name == name
            and any(sha256.startswith(meant.hash_prefix) for sha256 in removed)
            and not any(sha256.startswith(meant.hash_prefix) for sha256 in kept)
        )

    return Users(
        [alias for alias in pointing if breaks(Ref(alias))],
        [
            profile.name
            for profile in stored_profiles(connection)
            if any(
                reference.kind == kind and breaks(parse_ref(kind, reference.ref))
                for reference in references(profile.spec)
            )
        ],
    )


def profiles_naming(connection: Connection, alias: Alias) -> list[tuple[str, Ref]]:
    """The profiles that use the alias, each with how."""
    return [
        (profile.name, ref)
        for profile in stored_profiles(connection)
        for reference in references(profile.spec)
        if reference.kind == alias.kind
        and (ref := parse_ref(alias.kind, reference.ref)).name == alias.name
    ]
