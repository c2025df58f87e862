"""Profiles: steering specs under a name, which clients use as a model."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from starlette.responses import JSONResponse

from steer.registry.profiles import Profile
from steer.spec import SteeringSpec, StoredName, parse_spec
from steer_server.generation.steering import compile_spec
from steer_server.http.content_type import require_json
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

router = APIRouter(
    prefix="/v1/steering/profiles",
    tags=["profiles"],
    dependencies=[Depends(require_json)],
    route_class=SteerRoute,
)


def _spec(value: Any) -> SteeringSpec:
    if not isinstance(value, dict):
        raise ValueError("'spec' is an object with a list 'interventions'")
    return parse_spec(value, at="/spec")


class ProfileRequest(BaseModel):
    """A profile to save. With `pin`, every name in its spec becomes `name@hash` of what it means
    now, so that new versions do not change the profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: StoredName
    spec: Annotated[SteeringSpec, BeforeValidator(_spec)]
    description: Annotated[str, Field(max_length=4096)] = ""
    pin: StrictBool = False


class ProfileBody(BaseModel):
    """A saved profile; `model` is what clients send as `model` to use it."""

    object: str = "steering.profile"
    name: str
    model: str
    spec: SteeringSpec
    description: str


class ProfileList(BaseModel):
    """All profiles by name."""

    object: str = "list"
    data: list[ProfileBody]


class ProfileDeleted(BaseModel):
    """What was removed."""

    name: str
    deleted: bool = True


@router.post("", response_model=ProfileBody)
def save_profile(body: ProfileRequest, serving: ServingDep) -> Response:
    """Saves a profile, in place of one with the same name, once its spec fits this model."""
    compile_spec(serving, body.spec, at="/spec")
    profile = Profile(name=body.name, spec=body.spec, description=body.description)
    return _json(_body(serving, serving.registry.put_profile(profile, pin=body.pin)))


@router.get("", response_model=ProfileList)
def list_profiles(serving: ServingDep) -> Response:
    """All profiles by name."""
    found = [_body(serving, profile) for profile in serving.registry.profiles()]
    return _json(ProfileList(data=found))


@router.get("/{name}", response_model=ProfileBody)
def show_profile(name: str, serving: ServingDep) -> Response:
    """One profile."""
    return _json(_body(serving, serving.registry.profile(name)))


@router.delete("/{name}", response_model=ProfileDeleted)
def delete_profile(name: str, serving: ServingDep) -> Response:
    """Removes a profile."""
    serving.registry.remove_profile(name)
    return _json(ProfileDeleted(name=name))


def _body(serving: Serving, profile: Profile) -> ProfileBody:
    return ProfileBody(
        name=profile.name,
        model=f"{serving.model_name}:{profile.name}",
        spec=profile.spec,
        description=profile.description,
    )


def _json(body: BaseModel) -> Response:
    return JSONResponse(body.model_dump(mode="json", by_alias=True, exclude_none=True))
