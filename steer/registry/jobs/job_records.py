"""A job and its events, as the catalogue holds them."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TypeAlias, get_args

JobState: TypeAlias = Literal[
    "queued", "running", "succeeded", "failed", "cancelled", "interrupted"
]
STATES: tuple[JobState, ...] = get_args(JobState)
FINISHED: tuple[JobState, ...] = ("succeeded", "failed", "cancelled", "interrupted")
"""States that a job never leaves."""

EventType: TypeAlias = Literal["state", "progress"]


@dataclass(frozen=True)
class JobFailure:
    """Why a job has no result, in the words of an HTTP error."""

    code: str
    message: str
    param: str | None = None


@dataclass(frozen=True)
class JobProgress:
    """`done` of `total` units (None: not known yet), and what is being done."""

    done: int = 0
    total: int | None = None
    note: str = ""


@dataclass(frozen=True)
class Job:
    """One job. Times are in UTC; `attempt` counts how often it was begun; `request` is what was
    asked for, without the data; `last_event` is the number of its newest event."""

    id: str
    kind: str
    state: JobState
    request: dict[str, Any]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    attempt: int
    cancelling: bool
    progress: JobProgress
    last_event: int
    result: dict[str, Any] | None
    error: JobFailure | None

    @property
    def finished(self) -> bool:
        return self.state in FINISHED


@dataclass(frozen=True)
class JobEvent:
    """Something that happened to a job. Numbers start at 1 and grow by one; `data` has `state`
    (with `attempt`, and `error` where there is one) or `done`, `total` and `note`."""

    number: int
    type: EventType
    at: datetime
    data: dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """A job that this process may run: its parameters, and the lease that its writes must show."""

    job_id: str
    kind: str
    params: dict[str, Any]
    owner: str
    attempt: int


def job_of(row: Any) -> Job:
    """A row of the table `jobs`."""
    error = None if row["error"] is None else JobFailure(**json.loads(row["error"]))
    return Job(
        id=row["id"],
        kind=row["kind"],
        state=row["state"],
        request=json.loads(row["request"]),
        created_at=_utc(row["created_at"]),
        started_at=None if row["started_at"] is None else _utc(row["started_at"]),
        finished_at=None if row["finished_at"] is None else _utc(row["finished_at"]),
        attempt=row["attempt"],
        cancelling=bool(row["cancelling"]) and row["state"] == "running",
        progress=JobProgress(row["done"], row["total"], row["note"]),
        last_event=row["last_event"],
        result=None if row["result"] is None else json.loads(row["result"]),
        error=error,
    )


def event_of(row: Any) -> JobEvent:
    """A row of the table `job_events`."""
    return JobEvent(row["number"], row["type"], _utc(row["at"]), json.loads(row["data"]))


def _utc(time: datetime) -> datetime:
    return time.replace(tzinfo=UTC)
