"""Asking for a job: one route for each kind. The answer is 202 with the job, and where it is."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Request, Response
from pydantic import BaseModel, ValidationError

from steer.artefacts.kinds import KINDS
from steer.errors import SteerError, TooLarge
from steer.jobs import JobKind, builtin_kinds
from steer.jobs.kinds.importing import UPLOAD, ImportParams
from steer.registry.jobs.job_records import Job
from steer_server.http.content_type import require_json
from steer_server.http.error_route import SteerRoute
from steer_server.http.json_body import is_json, parse_json
from steer_server.http.openai_errors import invalid_field
from steer_server.http.uploads import (
    IMPORT_FIELDS,
    LAYERS_FIELD,
    Received,
    form_layers,
    receive,
)
from steer_server.routes.jobs import JobBody, job_body, json_response
from steer_server.state import Serving, ServingDep

router = APIRouter(prefix="/v1/steering", tags=["jobs"], route_class=SteerRoute)

_ACCEPTED: dict[int | str, dict[str, Any]] = {
    202: {
        "model": JobBody,
        "headers": {"Location": {"description": "The job", "schema": {"type": "string"}}},
    }
}
_JSON = [Depends(require_json)]


def _add_route(kind: JobKind[Any]) -> None:
    """A route that asks for a job of `kind`, at its name."""

    def ask(body: BaseModel, serving: ServingDep) -> Response:
        return _accepted(serving.jobs.submit(kind.name, body))

    # FastAPI reads the body's model from the annotation, and the rest from the name.
    ask.__annotations__["body"] = kind.params
    ask.__name__ = kind.name.replace("/", "_").replace("-", "_")
    ask.__doc__ = kind.summary
    router.post(f"/{kind.name}", status_code=202, responses=_ACCEPTED, dependencies=_JSON)(ask)


for _kind in builtin_kinds().values():
    if _kind.params is not ImportParams:  # which takes files as well
        _add_route(_kind)


_FIELDS = {
    "artefact": {"enum": [row.name for row in KINDS]},
    "from": {"type": "string"},
    **IMPORT_FIELDS,
}
_IMPORT_BODY = {
    "requestBody": {
        "required": True,
        "content": {
            "application/json": {
                "schema": {
                    "type": "object",
                    "required": ["name", "source"],
                    "additionalProperties": False,
                    "properties": {
                        "source": {"type": "string", "description": "A URL"},
                        **_FIELDS,
                        "layers": {
                            "type": "array",
                            "items": {"type": "integer", "minimum": 0},
                            "minItems": 1,
                            "maxItems": 1024,
                        },
                    },
                }
            },
            "multipart/form-data": {
                "schema": {
                    "type": "object",
                    "required": ["file"],
                    "additionalProperties": False,
                    "properties": {
                        "file": {"type": "string", "format": "binary"},
                        **_FIELDS,
                        "layers": LAYERS_FIELD,
                    },
                }
            },
        },
    }
}


@router.post("/import", name="import_artefact", responses=_ACCEPTED, openapi_extra=_IMPORT_BODY)
async def import_artefact(request: Request, serving: ServingDep) -> Response:
    """Imports an artefact from a URL (JSON) or from files sent along (multipart/form-data)."""
    if is_json(request):
        params = _params(ImportParams, await _json_body(request, serving))
        if params.source is None:
            raise SteerError(
                "the field 'source' is required: give a URL, or send the file itself as "
                "multipart/form-data",
                param="/source",
                code="missing_field",
            )
        return _accepted(await to_thread.run_sync(serving.jobs.submit, "import", params))
    with ExitStack() as stack:
        received = await receive(
            request, serving.registry, stack, limit=serving.settings.max_upload_bytes
        )
        return _accepted(await to_thread.run_sync(_submit_files, serving, received))


def _submit_files(serving: Serving, received: Received) -> Job:
    params = _params(ImportParams, _fields(received))
    if params.source is not None:
        raise SteerError(
            "'source' and a file do not go together: send one of them",
            param="/source",
            code="invalid_value",
        )
    single = len(received.files) == 1
    files: dict[str, Path] = {
        UPLOAD if single else name: upload.path for name, upload in received.files
    }
    return serving.jobs.submit("import", params, files)


def _fields(received: Received) -> dict[str, Any]:
    """The form's fields as parameters; numbers are read by their model."""
    fields: dict[str, Any] = {"name": received.stem, **received.fields}
    if "layers" in fields:
        fields["layers"] = form_layers(fields["layers"])
    return fields


def _params(model: type[ImportParams], fields: Mapping[str, Any]) -> ImportParams:
    try:
        return model.model_validate(fields)
    except ValidationError as error:
        raise invalid_field(error, fields, model) from None


async def _json_body(request: Request, serving: Serving) -> Mapping[str, Any]:
    limit = serving.settings.max_body_bytes
    data = bytearray()
    async for chunk in request.stream():
        data += chunk
        if len(data) > limit:
            raise TooLarge(f"the request body is longer than the limit of {limit} bytes: send less")
    found = await to_thread.run_sync(parse_json, bytes(data))
    if not isinstance(found, dict):
        raise SteerError("the body must be a JSON object", code="invalid_json")
    return found


def _accepted(job: Job) -> Response:
    body: BaseModel = job_body(job)
    return json_response(body, 202, {"location": f"/v1/jobs/{job.id}"})
