"""Profiles: steering specs under a name, and the artefacts a spec refers to."""

from __future__ import annotations

import difflib
from collections.abc import Iterator
from collections.abc import Set as AbstractSet
from typing import Annotated, NamedTuple

from pydantic import AfterValidator, BaseModel, ConfigDict, Field
from sqlalchemy import Connection, delete, select
from sqlalchemy.dialects.sqlite import insert

from steer.control_vector import ArtefactKind
from steer.errors import UnknownArtefact, pointer
from steer.registry.entry import Ref, parse_ref
from steer.registry.schema import profiles
from steer.spec import Clamp, Concept, LowRank, SteeringSpec, check_name


class Profile(BaseModel):
    """A steering spec that clients use by its name, as `model: "<model>:<name>"`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(check_name)]
    spec: SteeringSpec
    description: Annotated[str, Field(max_length=4096)] = ""


class Reference(NamedTuple):
    """An artefact that a spec names, and where (a JSON pointer relative to the spec)."""

    kind: ArtefactKind
    ref: str
    param: str


def references(spec: SteeringSpec) -> Iterator[Reference]:
    """Every registered artefact that `spec` names; inline vectors are not registered."""
    if spec.when is not None and isinstance(spec.when.vector, str):
        yield Reference("vector", spec.when.vector, pointer("when", "vector"))
    for place, item in enumerate(spec.interventions):
        at = pointer("interventions", place)
        if isinstance(item, Clamp | Concept):
            yield Reference("sae", item.sae, at + "/sae")
        if isinstance(item, LowRank):
            yield Reference("low_rank", item.adapter, at + "/adapter")
        for field in ("vector", "toward", "remove", "add"):
            value = getattr(item, field, None)
            if isinstance(value, str):
                yield Reference("vector", value, f"{at}/{field}")
        if item.when is not None and isinstance(item.when.vector, str):
            yield Reference("vector", item.when.vector, at + "/when/vector")


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
    statement = insert(profiles).values(name=profile.name, profile=text)
    connection.execute(
        statement.on_conflict_do_update(index_elements=["name"], set_={"profile": text})
    )


def delete_profile(connection: Connection, name: str) -> bool:
    """Whether there was one."""
    return connection.execute(delete(profiles).where(profiles.c.name == name)).rowcount > 0


def unknown_profile(connection: Connection, name: str) -> UnknownArtefact:
    """The error for a profile that is not there, with the names it may have meant."""
    names = list(connection.execute(select(profiles.c.name).order_by(profiles.c.name)).scalars())
    near = difflib.get_close_matches(name, names, n=3) or names[:5]
    hint = f"did you mean {', '.join(map(repr, near))}?" if near else "none is stored"
    return UnknownArtefact(f"there is no profile named {name!r}; {hint}", code="unknown_profile")


def users_of(
    connection: Connection,
    kind: ArtefactKind,
    name: str,
    removed: AbstractSet[str],
    kept: AbstractSet[str],
) -> list[str]:
    """The profiles that would name nothing if `removed` hashes went and `kept` stayed."""
    return [
        profile.name
        for profile in stored_profiles(connection)
        if any(
            reference.kind == kind and _breaks(parse_ref(kind, reference.ref), name, removed, kept)
            for reference in references(profile.spec)
        )
    ]


def _breaks(ref: Ref, name: str, removed: AbstractSet[str], kept: AbstractSet[str]) -> bool:
    return (
        ref.name == name
        and any(sha256.startswith(ref.hash_prefix) for sha256 in removed)
        and not any(sha256.startswith(ref.hash_prefix) for sha256 in kept)
    )
