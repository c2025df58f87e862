"""The files that a job has made: listed, and fetched."""

from __future__ import annotations

from fastapi import APIRouter, Response
from pydantic import BaseModel
from starlette.responses import FileResponse

from steer.errors import Conflict
from steer_server.http.error_route import SteerRoute
from steer_server.routes.jobs import json_response
from steer_server.state import ServingDep

router = APIRouter(prefix="/v1/jobs/{job_id}/files", tags=["jobs"], route_class=SteerRoute)


class JobFileBody(BaseModel):
    """A file; its hash, where it has one, is in the job's own account of its files."""

    name: str
    bytes: int


class JobFileList(BaseModel):
    """The files of a job, by name: none where it makes none, or another machine has them."""

    object: str = "list"
    data: list[JobFileBody]


@router.get("", response_model=JobFileList)
def list_job_files(job_id: str, serving: ServingDep) -> Response:
    """The files that a job which succeeded has made; they are kept until it is forgotten."""
    serving.jobs.store.get(job_id)
    found = serving.registry.job_outputs.files(job_id)
    rows = [JobFileBody(name=one.name, bytes=one.stat().st_size) for one in found]
    return json_response(JobFileList(data=rows))


@router.get(
    "/{name}",
    response_class=FileResponse,
    responses={
        200: {"content": {"application/octet-stream": {}}},
        206: {"content": {"application/octet-stream": {}}, "description": "The range asked for"},
    },
)
def fetch_job_file(job_id: str, name: str, serving: ServingDep) -> Response:
    """One of them; `Range` asks for a part of it."""
    job = serving.jobs.store.get(job_id)
    if not job.finished:
        raise Conflict(
            f"the job {job_id!r} is {job.state}: its files can be fetched when it has succeeded",
            code="job_not_finished",
        )
    return FileResponse(
        serving.registry.job_outputs.file(job_id, name), media_type="application/octet-stream"
    )
