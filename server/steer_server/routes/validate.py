"""POST /v1/steering/validate: what a spec would do, or everything that is wrong with it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Depends
from pydantic import BaseModel, ConfigDict

from steer.errors import Problem, SteerError, UnknownModel
from steer.spec import parse_spec
from steer.spec.wording import numbered_from_end
from steer_server.generation.steering import profile_of
from steer_server.http.content_type import require_json
from steer_server.http.error_route import SteerRoute
from steer_server.state import Serving, ServingDep

router = APIRouter(tags=["steering"], dependencies=[Depends(require_json)], route_class=SteerRoute)


class ValidationRequest(BaseModel):
    """A spec, as it would stand in a request for `model`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steering: dict[str, Any]
    model: str | None = None


class ProblemBody(BaseModel):
    """One thing wrong: what, under which stable code, and where in the request."""

    message: str
    code: str
    param: str | None


class Validation(BaseModel):
    """`plan` says what would be applied where; it is null where there are problems."""

    valid: bool
    problems: list[ProblemBody]
    plan: dict[str, Any] | None = None


@router.post("/v1/steering/validate")
def validate(body: ValidationRequest, serving: ServingDep) -> Validation:
    """Compiles the spec as a request would, without running it. Answers 200 either way."""
    problems = list(_model_problems(serving, body.model))
    try:
        spec = parse_spec(body.steering, at="/steering")
    except SteerError as error:
        layers = serving.engine.info.n_layers
        said = [
            replace(one, message=numbered_from_end(one.message, layers)) for one in error.problems
        ]
        return _invalid([*problems, *said])
    problems += [
        Problem(found.message, found.code, "/steering" + (found.param or ""))
        for found in serving.plans.check(spec)
    ]
    if problems:
        return _invalid(problems)
    return Validation(valid=True, problems=[], plan=serving.plans.plan(spec).describe())


def _invalid(problems: list[Problem]) -> Validation:
    bodies = [ProblemBody(message=one.message, code=one.code, param=one.param) for one in problems]
    return Validation(valid=False, problems=bodies)


def _model_problems(serving: Serving, model: str | None) -> tuple[Problem, ...]:
    if model is None or model == serving.model_name:
        return ()
    try:
        profile = profile_of(serving, model)
    except UnknownModel as error:
        return error.problems
    message = f"the model {model!r} is already steered by the profile {profile.name!r}"
    return (Problem(message, "steering_conflict", "/model"),)
