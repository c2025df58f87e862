"""Aliases: names that stand for an artefact's name, or for one version of it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict
from starlette.responses import JSONResponse

from steer.artefacts.kinds import NAMED, PLURALS, Plural
from steer.registry.catalogue.aliases import Alias
from steer.spec import Name
from steer_server.http.content_type import require_json
from steer_server.http.error_route import SteerRoute
from steer_server.state import ServingDep

router = APIRouter(
    prefix="/v1/steering/aliases",
    tags=["aliases"],
    dependencies=[Depends(require_json)],
    route_class=SteerRoute,
)


class AliasRequest(BaseModel):
    """What an alias stands for: a name (its newest version, whichever that is) or `name@hash`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Name


class AliasBody(BaseModel):
    """One alias; `target` is a name or `name@hash`."""

    object: str = "steering.alias"
    artefacts: Plural
    name: str
    target: str


class AliasList(BaseModel):
    """All aliases by kind and name."""

    object: str = "list"
    data: list[AliasBody]


class AliasDeleted(BaseModel):
    """What was removed."""

    name: str
    deleted: bool = True


@router.get("", response_model=AliasList)
def list_aliases(
    serving: ServingDep, artefacts: Annotated[Plural | None, Query()] = None
) -> Response:
    """All aliases by kind and name, or those for one kind of artefacts."""
    found = serving.registry.aliases(None if artefacts is None else PLURALS[artefacts].name)
    return _json(AliasList(data=[_body(alias) for alias in found]))


@router.put("/{artefacts}/{name}", response_model=AliasBody)
def save_alias(artefacts: Plural, name: str, body: AliasRequest, serving: ServingDep) -> Response:
    """Makes `name` stand for `target`; an alias of that name is moved, in one step for all."""
    alias = serving.registry.set_alias(PLURALS[artefacts].name, name, body.target)
    return _json(_body(alias))


@router.delete("/{artefacts}/{name}", response_model=AliasDeleted)
def delete_alias(artefacts: Plural, name: str, serving: ServingDep) -> Response:
    """Removes an alias, and nothing else."""
    alias = serving.registry.unset_alias(PLURALS[artefacts].name, name)
    return _json(AliasDeleted(name=alias.name))


def _body(alias: Alias) -> AliasBody:
    return AliasBody(artefacts=NAMED[alias.kind].plural, name=alias.name, target=alias.ref)


def _json(body: BaseModel) -> Response:
    return JSONResponse(body.model_dump(mode="json"))
