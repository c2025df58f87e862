"""Jobs: listed, shown, followed, cancelled and forgotten."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator
from contextlib import aclosing
from datetime import datetime
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Response
from pydantic import BaseModel
from starlette.responses import JSONResponse

from steer.errors import SteerError
from steer.registry.jobs.job_records import EventType, Job, JobEvent, JobState
from steer_server.http.disconnect import EventStream
from steer_server.http.error_route import SteerRoute
from steer_server.http.openai_errors import failure
from steer_server.routes.job_events import follow
from steer_server.state import Serving, ServingDep

_DIGITS = 10
"""Events are numbered from 1 in a column of 32 bits: longer numbers are none of ours."""

router = APIRouter(prefix="/v1/jobs", tags=["jobs"], route_class=SteerRoute)


class ProgressBody(BaseModel):
    """`done` of `total` units (null: not known), and what is being done."""

    done: int
    total: int | None
    note: str


class FailureBody(BaseModel):
    """Why a job has no result, as in the body of an error."""

    code: str
    message: str
    param: str | None


class JobBody(BaseModel):
    """A job. `request` is what was asked for, without its data; `attempt` how often it was begun;
    `cancelling` that it is about to stop; `last_event` the number of its newest event."""

    id: str
    object: str = "job"
    kind: str
    state: JobState
    request: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    cancelling: bool
    progress: ProgressBody
    last_event: int
    result: dict[str, Any] | None
    error: FailureBody | None


class JobList(BaseModel):
    """One page, the newest first; `has_more` says whether `offset + limit` finds more."""

    object: str = "list"
    data: list[JobBody]
    has_more: bool


class EventBody(BaseModel):
    """Something that happened to a job; numbers grow by one."""

    number: int
    type: EventType
    at: datetime
    data: dict[str, Any]


class EventList(BaseModel):
    """Events after the one asked for, and the job at that moment."""

    object: str = "list"
    data: list[EventBody]
    job: JobBody


class JobDeleted(BaseModel):
    """What was forgotten."""

    id: str
    deleted: bool = True


@router.get("", response_model=JobList)
def list_jobs(
    serving: ServingDep,
    kind: Annotated[str | None, Query(max_length=64)] = None,
    state: JobState | None = None,
    limit: Annotated[int, Query(ge=1, le=1000)] = 100,
    offset: Annotated[int, Query(ge=0, le=2**31)] = 0,
) -> Response:
    """The jobs of this registry, the newest first, whichever server runs them."""
    found = serving.jobs.store.page(kind=kind, state=state, limit=limit + 1, offset=offset)
    rows = [job_body(job) for job in found[:limit]]
    return json_response(JobList(data=rows, has_more=len(found) > limit))


@router.get("/{job_id}", response_model=JobBody)
def show_job(job_id: str, serving: ServingDep) -> Response:
    """One job, with its result or the reason why there is none."""
    return json_response(job_body(serving.jobs.store.get(job_id)))


@router.get(
    "/{job_id}/events",
    response_model=EventList,
    responses={
        200: {"content": {"text/event-stream": {}}},
        204: {"description": "The job has finished and nothing is left to send"},
    },
)
async def job_events(
    job_id: str,
    serving: ServingDep,
    after: Annotated[
        int | None,
        Query(ge=0, le=2**31, description="Answer at once, with the events after this number"),
    ] = None,
    last_event_id: Annotated[
        str | None, Header(description="The number of the last event that was received")
    ] = None,
) -> Response:
    """What happens to a job, as server-sent events: those after `Last-Event-ID`, then new ones as
    they come; the last is `end`, with the finished job. With `?after=` the answer is JSON."""
    seen = _number(last_event_id) if after is None else after
    job, found = await to_thread.run_sync(serving.jobs.store.events, job_id, seen)
    if after is not None:
        body = EventList(data=[event_body(event) for event in found], job=job_body(job))
        return json_response(body)
    if job.finished and last_event_id is not None and seen >= job.last_event:
        return Response(status_code=204)  # browsers then stop asking again
    return EventStream(_lines(serving, job_id, seen))


@router.post("/{job_id}/cancel", response_model=JobBody)
def cancel_job(job_id: str, serving: ServingDep) -> Response:
    """Cancels a job: at once while it waits, at its next step while it runs. May be repeated."""
    return json_response(job_body(serving.jobs.cancel(job_id)))


@router.delete("/{job_id}", response_model=JobDeleted)
def delete_job(job_id: str, serving: ServingDep) -> Response:
    """Forgets a finished job. What it registered stays; the files of a capture do not."""
    return json_response(JobDeleted(id=serving.jobs.remove(job_id).id))


def job_body(job: Job) -> JobBody:
    """The job as clients see it."""
    fields = {name: getattr(job, name) for name in JobBody.model_fields if name != "object"}
    progress = ProgressBody(**vars(job.progress))
    error = None if job.error is None else FailureBody(**vars(job.error))
    return JobBody.model_validate({**fields, "progress": progress, "error": error})


def event_body(event: JobEvent) -> EventBody:
    """The event as clients see it."""
    return EventBody(**vars(event))


def json_response(
    body: BaseModel, status: int = 200, headers: dict[str, str] | None = None
) -> Response:
    """`body` as JSON, its nulls included."""
    return JSONResponse(json.loads(body.model_dump_json()), status, headers)


async def _lines(serving: Serving, job_id: str, seen: int) -> AsyncGenerator[str, None]:
    """The stream's text. Whatever ends it early is its last event, `error`."""
    async with aclosing(follow(serving.jobs, job_id, seen)) as events:
        async for event in events:
            if isinstance(event, JobEvent):
                data = event_body(event).model_dump_json()
                yield f"id: {event.number}\nevent: {event.type}\ndata: {data}\n\n"
            elif isinstance(event, Job):
                # Without an id: who is cut off here asks for it again.
                yield f"event: end\ndata: {job_body(event).model_dump_json()}\n\n"
            elif isinstance(event, SteerError):
                yield f"event: error\ndata: {json.dumps(failure(event)[1])}\n\n"
            else:
                yield ": still here\n\n"


def _number(text: str | None) -> int:
    """The event that a client names as its last; the first of all where it names none of ours."""
    known = text is not None and text.isascii() and text.isdigit() and len(text) < _DIGITS
    return int(text) if known and text is not None else 0
