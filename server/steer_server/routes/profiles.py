"""Profiles: steering specs under a name, which clients use as a model."""

from __future__ import annotations

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StrictBool
from starlette.responses import JSONResponse

from steer.artefacts.arming import ArmedDetectors
from steer.registry.profiles import Profile
from steer.spec import SteeringSpec, StoredName, parse_spec
from steer_server.generation.inspection.detectors import check_armed
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
    """A profile to save. `detectors` watch every request that uses it. With `pin`, every name in it
    becomes `name@hash` of what it means now, so that new versions do not change the profile."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: StoredName
    spec: Annotated[SteeringSpec, BeforeValidator(_spec)]
    detectors: ArmedDetectors = ()
    description: Annotated[str, Field(max_length=4096)] = ""
    pin: StrictBool = False


class ProfileBody(BaseModel):
    """A saved profile; `model` is what clients send as `model` to use it.

    `for_model` is the model that it was saved for; left out where it serves every model.
    """

    object: str = "steering.profile"
    name: str
    model: str
    for_model: str | None = None
    spec: SteeringSpec
    detectors: ArmedDetectors = Field(default=(), exclude_if=lambda value: not value)
    description: str


class ProfileList(BaseModel):
    """Profiles by name."""

    object: str = "list"
    data: list[ProfileBody]


class ProfileDeleted(BaseModel):
    """What was removed."""

    name: str
    deleted: bool = True


@router.post("", response_model=ProfileBody)
def save_profile(body: ProfileRequest, serving: ServingDep) -> Response:
    """Saves a profile for this model, in place of its own with the same name, once the spec and the
    detectors fit it."""
    compile_spec(serving, body.spec, at="/spec")
    check_armed(serving, body.detectors, at="/detectors")
    profile = Profile(
        name=body.name, spec=body.spec, detectors=body.detectors, description=body.description
    )
    return _json(_body(serving, serving.registry.put_profile(profile, pin=body.pin)))


@router.get("", response_model=ProfileList)
def list_profiles(
    serving: ServingDep, model: Annotated[str | None, Query(max_length=256)] = None
) -> Response:
    """The profiles that serve this model by name, those of another `model`, or with `*` all."""
    found = [_body(serving, profile) for profile in serving.registry.profiles(model)]
    return _json(ProfileList(data=found))


@router.get("/{name}", response_model=ProfileBody)
def show_profile(name: str, serving: ServingDep) -> Response:
    """One profile."""
    return _json(_body(serving, serving.registry.profile(name)))


@router.delete("/{name}", response_model=ProfileDeleted)
def delete_profile(name: str, serving: ServingDep) -> Response:
    """Removes a profile of this model, and the one that serves every model."""
    serving.registry.remove_profile(name)
    return _json(ProfileDeleted(name=name))


def _body(serving: Serving, profile: Profile) -> ProfileBody:
    own = profile.model is None or serving.engine.info.is_called(profile.model)
    served = serving.model_name if own else profile.model
    return ProfileBody(
        name=profile.name,
        model=f"{served}:{profile.name}",
        for_model=profile.model,
        spec=profile.spec,
        detectors=profile.detectors,
        description=profile.description,
    )


def _json(body: BaseModel) -> Response:
    return JSONResponse(body.model_dump(mode="json", by_alias=True, exclude_none=True))
