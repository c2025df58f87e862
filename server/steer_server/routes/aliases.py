"""Aliases: names that stand for an artefact's name, or for one version of it."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query, Response
from pydantic import BaseModel, ConfigDict, Field
from starlette.responses import JSONResponse

from steer.artefacts.control_vector import ArtefactKind
from steer.registry.catalogue.aliases import Alias
from steer_server.http.content_type import require_json
from steer_server.http.error_route import SteerRoute
from steer_server.state import ServingDep

router = APIRouter(
    prefix="/v1/steering/aliases",
    tags=["aliases"],
    dependencies=[Depends(require_json)],
    route_class=SteerRoute,
)

Folder = Literal["vectors", "saes", "adapters"]
_KINDS: dict[Folder, ArtefactKind] = {"vectors": "vector", "saes": "sae", "adapters": "low_rank"}
_FOLDERS = {kind: folder for folder, kind in _KINDS.items()}


class AliasRequest(BaseModel):
    """What an alias stands for: a name (its newest version, whichever that is) or `name@hash`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    target: Annotated[str, Field(max_length=256)]


class AliasBody(BaseModel):
    """One alias; `target` is a name or `name@hash`."""

    object: str = "steering.alias"
    artefacts: Folder
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
    serving: ServingDep, artefacts: Annotated[Folder | None, Query()] = None
) -> Response:
    """All aliases by kind and name, or those for one kind of artefacts."""
    found = serving.registry.aliases(None if artefacts is None else _KINDS[artefacts])
    return _json(AliasList(data=[_body(alias) for alias in found]))


@router.put("/{artefacts}/{name}", response_model=AliasBody)
def save_alias(artefacts: Folder, name: str, body: AliasRequest, serving: ServingDep) -> Response:
    """Makes `name` stand for `target`; an alias of that name is moved, in one step for all."""
    return _json(_body(serving.registry.set_alias(_KINDS[artefacts], name, body.target)))


@router.delete("/{artefacts}/{name}", response_model=AliasDeleted)
def delete_alias(artefacts: Folder, name: str, serving: ServingDep) -> Response:
    """Removes an alias, and nothing else."""
    return _json(AliasDeleted(name=serving.registry.unset_alias(_KINDS[artefacts], name).name))


def _body(alias: Alias) -> AliasBody:
    return AliasBody(artefacts=_FOLDERS[alias.kind], name=alias.name, target=alias.ref)


def _json(body: BaseModel) -> Response:
    return JSONResponse(body.model_dump(mode="json"))
