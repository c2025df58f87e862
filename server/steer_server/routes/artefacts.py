"""Upload, list, show, download and delete: the same routes for every kind of artefact."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import datetime
from pathlib import Path
from typing import IO, Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request, Response
from fastapi import Path as PathParameter
from pydantic import BaseModel
from starlette.responses import JSONResponse, StreamingResponse

from steer.artefacts.control_vector import Card
from steer.artefacts.kinds import KINDS, ArtefactKind, KindRow
from steer.errors import SteerError, pointer
from steer.formats.exporting import SUFFIXES, ExportFormat, check_exported, export_vector
from steer.formats.options import ImportOptions
from steer.formats.sources import SOURCES
from steer.model import bare_name, parse_layers
from steer.registry.catalogue.tags import TAG
from steer.registry.entry import Entry
from steer_server.http.error_route import SteerRoute
from steer_server.http.uploads import (
    IMPORT_FIELDS,
    LAYERS_FIELD,
    Received,
    form_layers,
    receive,
)
from steer_server.settings import MIB, ServerSettings
from steer_server.state import Serving, ServingDep

_CHUNK = 1 << 20
_UPLOAD_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        "from": {"type": "string", "enum": list(SOURCES)},
                        "layers": LAYERS_FIELD,
                        **IMPORT_FIELDS,
                    },
                }
            }
        },
    }
}


TagPath = Annotated[str, PathParameter(json_schema_extra={"pattern": f"^{TAG.pattern}$"})]


class ArtefactBody(BaseModel):
    """One version of an artefact. `id` names exactly this content, `name` the newest for a model.

    `removed_at` is there for one that was deleted and can be restored.
    """

    id: str
    object: str
    name: str
    version: int
    sha256: str
    size_bytes: int
    created_at: datetime
    model: str | None = None
    d_model: int
    layers: tuple[int, ...]
    card: Card
    tags: list[str]
    aliases: list[str] | None = None
    versions: list[str] | None = None
    removed_at: datetime | None = None


class ArtefactList(BaseModel):
    """One page; `has_more` says whether `offset + limit` finds more."""

    object: str = "list"
    data: list[ArtefactBody]
    has_more: bool


class Deleted(BaseModel):
    """What was removed."""

    id: str
    name: str
    deleted: bool = True


class Tagged(BaseModel):
    """The tags of a name, whatever its version."""

    name: str
    tags: list[str]


def artefact_routers() -> list[APIRouter]:
    """The routes of every kind of artefact."""
    return [_artefact_router(row) for row in KINDS]


def upload_place(row: KindRow) -> str:
    """The path below which the artefacts of a kind are, and to which new ones are uploaded."""
    return f"/v1/steering/{row.plural}"


def body_limit(settings: ServerSettings, path: str) -> int:
    """How many bytes the body of a request for `path` may have."""
    # An upload's own limit is on its files; a little more is needed for what is around them.
    if path.rstrip("/") in (*map(upload_place, KINDS), "/v1/steering/import"):
        return settings.max_upload_bytes + MIB
    return settings.max_body_bytes


def _artefact_router(row: KindRow) -> APIRouter:
    router = APIRouter(prefix=upload_place(row), tags=[row.plural], route_class=SteerRoute)
    kind = row.name

    @router.post(
        "",
        name=f"upload_{kind}",
        responses={200: {"model": ArtefactBody}, 201: {"model": ArtefactBody}},
        openapi_extra=_UPLOAD_BODY,
    )
    async def upload(request: Request, serving: ServingDep) -> Response:
        """Uploads a file; 201 for a new version, 200 where the newest has this content already."""
        with ExitStack() as stack:
            received = await receive(
                request, serving.registry, stack, limit=serving.settings.max_upload_bytes
            )
            entry, created = await to_thread.run_sync(_imported, serving, kind, received)
            return await to_thread.run_sync(stored_answer, serving, entry, created)

    @router.get("", name=f"list_{kind}s", response_model=ArtefactList)
    def index(
        serving: ServingDep,
        q: Annotated[str | None, Query(max_length=256)] = None,
        limit: Annotated[int, Query(ge=1, le=1000)] = 100,
        offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
        model: Annotated[str | None, Query(max_length=256)] = None,
        width: Annotated[int | None, Query(ge=1, le=2**31)] = None,
        tag: Annotated[str | None, Query(max_length=64)] = None,
        deleted: bool = False,
    ) -> Response:
        """The version that each name means here, where all that is given fits.

        `q` is part of a name, description or tag; `deleted` lists what can be restored instead.
        Names that are another model's alone are left out, unless with that `model`; `*` is all.
        """
        found = serving.registry.entries(
            kind,
            query=q,
            model=model,
            width=width,
            tag=tag,
            deleted=deleted,
            limit=limit + 1,
            offset=offset,
        )
        tags = serving.registry.tags(kind, [entry.name for entry in found[:limit]])
        rows = [_body(entry, tags.get(entry.name, ())) for entry in found[:limit]]
        return _json(ArtefactList(data=rows, has_more=len(found) > limit))

    @router.get("/{name}", name=f"show_{kind}", response_model=ArtefactBody)
    def show(name: str, serving: ServingDep) -> Response:
        """One artefact, by name, `name@hash` or alias; lists the versions for all models.

        A name means its newest version for this model; where there is none, the newest of all.
        """
        entry = serving.registry.entry(kind, name)
        versions = [one.id for one in serving.registry.versions(kind, entry.name)]
        aliases = [alias.name for alias in serving.registry.aliases(kind, entry.name)]
        more = {"versions": versions, "aliases": aliases}
        return _json(_tagged(serving, kind, entry).model_copy(update=more))

    @router.get(
        "/{name}/content",
        name=f"download_{kind}",
        response_class=Response,
        responses={200: {"content": {"application/octet-stream": {}}}},
    )
    def content(
        name: str,
        serving: ServingDep,
        format: ExportFormat = "safetensors",
        layers: Annotated[
            str | None, Query(description="Only these, such as 1-5 or 2,3; GGUF has no block 0")
        ] = None,
    ) -> Response:
        """The canonical safetensors file, whose SHA-256 is the artefact's identity.

        Vectors also come as `gguf` and `safetensors-plain`, and with some of their `layers` alone;
        what such a file cannot say of the vector's use is in headers `steer-warning`.
        """
        entry = serving.registry.entry(kind, name)
        if format != "safetensors" or layers is not None:
            return _exported(serving, entry, format, layers)
        headers = {
            "content-disposition": f'attachment; filename="{entry.name}.safetensors"',
            "content-length": str(entry.size_bytes),
            "etag": f'"{entry.sha256}"',
        }
        return StreamingResponse(
            _blocks(serving.registry.content(kind, entry.id)),
            headers=headers,
            media_type="application/octet-stream",
        )

    @router.delete("/{name}", name=f"delete_{kind}", response_model=Deleted)
    def delete(name: str, serving: ServingDep) -> Response:
        """Removes a name with all its versions for this model, or with `name@hash` that content.

        It can be restored until the registry's garbage is collected.
        """
        entry = serving.registry.remove(kind, name)
        return _json(Deleted(id=entry.id, name=entry.name))

    @router.post("/{name}/restore", name=f"restore_{kind}", response_model=ArtefactBody)
    def restore(name: str, serving: ServingDep) -> Response:
        """Brings back what was deleted: a name with all its versions for this model, or
        `name@hash` alone."""
        return _json(_tagged(serving, kind, serving.registry.restore(kind, name)))

    @router.put("/{name}/tags/{tag}", name=f"tag_{kind}", response_model=Tagged)
    def put_tag(name: str, tag: TagPath, serving: ServingDep) -> Response:
        """Puts a tag on a name; all its tags."""
        held = serving.registry.change_tags(kind, name, add=[tag])
        return _json(Tagged(name=name, tags=list(held)))

    @router.delete("/{name}/tags/{tag}", name=f"untag_{kind}", response_model=Tagged)
    def delete_tag(name: str, tag: TagPath, serving: ServingDep) -> Response:
        """Takes a tag off a name; the tags it has left."""
        held = serving.registry.change_tags(kind, name, remove=[tag])
        return _json(Tagged(name=name, tags=list(held)))

    return router


def _exported(serving: Serving, entry: Entry, format: ExportFormat, layers: str | None) -> Response:
    check_exported(entry.kind)
    vector = serving.registry.vector(entry.id)
    if layers is not None:
        try:
            vector = vector.on_layers(parse_layers(layers))
        except SteerError as error:
            raise error.at("/layers") from None
    with tempfile.TemporaryDirectory(prefix="steer-export-") as folder:
        path = Path(folder) / "vector"
        warnings = export_vector(vector, path, format)
        data = path.read_bytes()
    filename = f"{entry.name}{SUFFIXES[format]}"
    response = Response(data, media_type="application/octet-stream")
    response.headers["content-disposition"] = f'attachment; filename="{filename}"'
    for warning in warnings:
        response.headers.append("steer-warning", warning.encode("ascii", "replace").decode())
    return response


def _imported(serving: Serving, kind: ArtefactKind, received: Received) -> tuple[Entry, bool]:
    options = _options(received.fields)
    name = received.fields.get("name") or received.stem
    try:
        with received.path() as path:
            return serving.registry.import_file(
                path, kind=kind, name=name, options=options, model=serving.engine.info
            )
    except SteerError as error:
        raise error.at("/file") from None


_FIELDS: Mapping[str, Callable[[str], Any]] = {
    "from": str,
    "layer_offset": int,
    "position": int,
    "site": str,
    "experiment": str,
    "layers": form_layers,
    "strength": float,
    "description": str,
    "licence": str,
    "model": str,
}


def _options(fields: Mapping[str, str]) -> ImportOptions:
    """The form fields that describe the file; raises for unknown ones."""
    given: dict[str, Any] = {}
    for name, text in fields.items():
        if name == "name":
            continue
        if name not in _FIELDS:
            raise SteerError(
                f"unknown field {name!r}: an upload has file, name, {', '.join(_FIELDS)}",
                param=pointer(name),
                code="unknown_field",
            )
        try:
            given[name] = _FIELDS[name](text)
        except ValueError as error:
            raise SteerError(
                f"{name}: {text[:60]!r} is not of the right form ({error})",
                param=pointer(name),
                code="invalid_value",
            ) from None
    if "from" in given:
        given["source"] = given.pop("from")
    return ImportOptions(**given)


def stored_answer(serving: Serving, entry: Entry, created: bool) -> Response:
    """The answer to whoever has stored `entry`: 201 for a new version."""
    return _json(_tagged(serving, entry.kind, entry), 201 if created else 200)


def _tagged(serving: Serving, kind: ArtefactKind, entry: Entry) -> ArtefactBody:
    return _body(entry, serving.registry.tags(kind, [entry.name]).get(entry.name, ()))


def _body(entry: Entry, tags: Sequence[str]) -> ArtefactBody:
    card = _shown(entry.card)
    return ArtefactBody(
        id=entry.id,
        object=f"steering.{entry.kind}",
        name=entry.name,
        version=entry.version,
        sha256=entry.sha256,
        size_bytes=entry.size_bytes,
        created_at=entry.created_at,
        model=card.model,
        d_model=card.width,
        layers=card.layers,
        card=card,
        tags=list(tags),
        removed_at=entry.removed_at,
    )


def _shown(card: Card) -> Card:
    """`card` without paths of machines in the place of models' names, as older ones have them."""
    changes: dict[str, Any] = {}
    if card.model and os.path.isabs(card.model):
        changes["model"] = bare_name(card.model)
    held = card.calibration
    if held is not None and os.path.isabs(held.model):
        changes["calibration"] = held.model_copy(update={"model": bare_name(held.model)})
    made_on = card.provenance.get("model")
    if isinstance(made_on, str) and os.path.isabs(made_on):
        changes["provenance"] = {**card.provenance, "model": bare_name(made_on)}
    return card.model_copy(update=changes)


def _json(body: BaseModel, status: int = 200) -> Response:
    return JSONResponse(json.loads(body.model_dump_json(by_alias=True, exclude_none=True)), status)


def _blocks(file: IO[bytes]) -> Iterator[bytes]:
    with file:
        while block := file.read(_CHUNK):
            yield block
