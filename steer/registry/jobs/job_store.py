"""Jobs in the catalogue: every change of state is one transaction, guarded by a lease.

A runner that claims a job holds a lease on it, which it renews while it lives. Each of its writes
names the lease (owner and attempt) and changes nothing once that is lost, so that two servers on
one registry never both finish a job, however long one of them was held up.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, Connection, delete, func, or_, select, update

from steer.errors import CapacityError, Conflict, UnknownArtefact
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.jobs.job_records import (
    FINISHED,
    Claim,
    EventType,
    Job,
    JobEvent,
    JobFailure,
    JobProgress,
    JobState,
    event_of,
    job_of,
)
from steer.registry.jobs.jobs import job_events, jobs

Clock = Callable[[], datetime]

KEPT_EVENTS = 256
"""Progress events kept for one job; the oldest go first, changes of state stay."""

_EMPTY = "{}"


class JobDraft(NamedTuple):
    """A job to be queued: see the table's columns."""

    id: str
    kind: str
    params: str
    request: str
    model: str | None
    place: str | None


def now() -> datetime:
    """The time in UTC, without a zone, as the catalogue stores it."""
    return datetime.now(UTC).replace(tzinfo=None)


def new_job_id() -> str:
    return f"job-{uuid.uuid4().hex[:24]}"


class JobStore:
    """Assumes: the clocks of all processes on this catalogue agree to within a lease.

    Guarantees: a job is run under one lease at a time; a change and its event are seen together;
    safe from many threads and processes.
    """

    def __init__(self, catalogue: Catalogue, clock: Clock = now) -> None:
        self._catalogue, self._clock = catalogue, clock

    # Clients

    def submit(self, draft: JobDraft, *, queue: int) -> Job:
        """Queues a job. Raises `CapacityError` where `queue` jobs wait for the same servers."""
        at = self._clock()
        with self._catalogue.writing() as connection:
            waiting = select(func.count()).where(jobs.c.state == "queued", _for(draft.model))
            if connection.execute(waiting).scalar_one() >= queue:
                raise CapacityError(
                    f"{queue} jobs are waiting already, which is this server's limit: come back "
                    "when some have finished, or cancel one"
                )
            connection.execute(
                jobs.insert().values(
                    **draft._asdict(),
                    state="queued",
                    created_at=at,
                    attempt=0,
                    cancelling=False,
                    done=0,
                    note="",
                    last_event=0,
                )
            )
            self._event(connection, draft.id, "state", {"state": "queued", "attempt": 0})
            return self._get(connection, draft.id)

    def get(self, job_id: str) -> Job:
        """One job; raises `UnknownArtefact` (`unknown_job`)."""
        with self._catalogue.reading() as connection:
            return self._get(connection, job_id)

    def page(
        self,
        *,
        kind: str | None = None,
        state: JobState | None = None,
        limit: int = 100,
        offset: int = 0,
    ) -> list[Job]:
        """Jobs, the newest first."""
        query = select(jobs).order_by(jobs.c.created_at.desc(), jobs.c.id)
        if kind is not None:
            query = query.where(jobs.c.kind == kind)
        if state is not None:
            query = query.where(jobs.c.state == state)
        with self._catalogue.reading() as connection:
            rows = connection.execute(query.limit(limit).offset(offset)).mappings()
            return [job_of(row) for row in rows]

    def events(self, job_id: str, after: int = 0) -> tuple[Job, Sequence[JobEvent]]:
        """The job and its events numbered above `after`, in order, from one state of the
        catalogue; raises `UnknownArtefact`."""
        with self._catalogue.reading() as connection:
            job = self._get(connection, job_id)
            if job.last_event <= after:
                return job, []
            query = select(job_events).where(
                job_events.c.job_id == job_id, job_events.c.number > after
            )
            rows = connection.execute(query.order_by(job_events.c.number)).mappings()
            return job, [event_of(row) for row in rows]

    def cancel(self, job_id: str) -> tuple[Job, bool]:
        """Cancels a job: at once while it is queued, at its next step while it runs; the job, and
        whether this call ended it.

        A job that is cancelled already stays so. Raises `Conflict` (`job_finished`) for one that
        ended in another way, `UnknownArtefact` for one that there is not.
        """
        with self._catalogue.writing() as connection:
            queued = _one(job_id) & (jobs.c.state == "queued")
            ended = self._end(connection, queued, "cancelled")
            if ended:
                self._event(connection, job_id, "state", {"state": "cancelled"})
            running = _one(job_id) & (jobs.c.state == "running")
            connection.execute(update(jobs).where(running).values(cancelling=True))
            job = self._get(connection, job_id)
        if job.finished and job.state != "cancelled":
            raise Conflict(
                f"the job {job_id!r} has ended already: it is {job.state}", code="job_finished"
            )
        return job, ended

    def remove(self, job_id: str) -> Job:
        """Forgets a finished job. Raises `Conflict` (`job_not_finished`, or `job_in_use` where one
        that has not finished reads its files), `UnknownArtefact`."""
        with self._catalogue.writing() as connection:
            job = self._get(connection, job_id)
            if not job.finished:
                raise Conflict(
                    f"the job {job_id!r} is {job.state}: cancel it first", code="job_not_finished"
                )
            reader = self._read_by(connection).get(job_id)
            if reader is not None:
                raise Conflict(
                    f"the job {reader!r} reads the files of {job_id!r}: wait until it has "
                    "finished, or cancel it",
                    code="job_in_use",
                )
            self._remove(connection, [job_id])
            return job

    def counts(self) -> dict[tuple[str, JobState], int]:
        """How many jobs there are of each kind and state."""
        query = select(jobs.c.kind, jobs.c.state, func.count()).group_by(jobs.c.kind, jobs.c.state)
        with self._catalogue.reading() as connection:
            return {(row[0], row[1]): row[2] for row in connection.execute(query)}

    def unfinished(self) -> set[str]:
        """The ids of all jobs that are queued or run."""
        with self._catalogue.reading() as connection:
            query = select(jobs.c.id).where(jobs.c.state.not_in(FINISHED))
            return set(connection.execute(query).scalars())

    def fetched_from(self, job_ids: Collection[str]) -> set[str]:
        """Those of `job_ids` whose files clients may fetch, now or later: jobs that succeeded, and
        that have not ended."""
        states = [state for state in FINISHED if state != "succeeded"]
        query = select(jobs.c.id).where(jobs.c.id.in_(job_ids), jobs.c.state.not_in(states))
        with self._catalogue.reading() as connection:
            return set(connection.execute(query).scalars())

    # Runners

    def claim(
        self, owner: str, *, kinds: Sequence[str], model: str, place: str, lease: float
    ) -> Claim | None:
        """The oldest queued job that this server can run, leased to `owner` for `lease` seconds."""
        able = (
            (jobs.c.state == "queued")
            & jobs.c.kind.in_(kinds)
            & _for(model)
            & or_(jobs.c.place.is_(None), jobs.c.place == place)
        )
        query = select(jobs.c.id).where(able).order_by(jobs.c.created_at, jobs.c.id).limit(1)
        with self._catalogue.reading() as connection:
            if connection.execute(query).first() is None:
                return None  # without the write lock, because an idle server asks again and again
        at = self._clock()
        with self._catalogue.writing() as connection:
            job_id = connection.execute(query).scalar()
            if job_id is None:
                return None
            # On the state again: where transactions overlap, only one changes the row.
            taken = connection.execute(
                update(jobs)
                .where(_one(job_id), jobs.c.state == "queued")
                .values(
                    state="running",
                    owner=owner,
                    lease_until=at + timedelta(seconds=lease),
                    attempt=jobs.c.attempt + 1,
                    started_at=func.coalesce(jobs.c.started_at, at),
                    done=0,
                    total=None,
                    note="",
                )
            )
            if not taken.rowcount:
                return None
            row = connection.execute(select(jobs).where(_one(job_id))).mappings().one()
            data = {"state": "running", "attempt": row["attempt"]}
            self._event(connection, job_id, "state", data)
            return Claim(job_id, row["kind"], json.loads(row["params"]), owner, row["attempt"])

    def renew(self, owner: str, job_ids: Sequence[str], *, lease: float) -> None:
        """Renews the leases of `owner` on these jobs."""
        until = self._clock() + timedelta(seconds=lease)
        mine = jobs.c.id.in_(job_ids) & (jobs.c.owner == owner) & (jobs.c.state == "running")
        with self._catalogue.writing() as connection:
            connection.execute(update(jobs).where(mine).values(lease_until=until))

    def progress(self, claim: Claim, progress: JobProgress) -> Job | None:
        """Writes down how far a claimed job is; None where the lease is lost."""
        with self._catalogue.writing() as connection:
            held = connection.execute(update(jobs).where(_held(claim)).values(**asdict(progress)))
            if not held.rowcount:
                return None
            self._event(connection, claim.job_id, "progress", asdict(progress))
            oldest = self._get(connection, claim.job_id).last_event - KEPT_EVENTS
            connection.execute(
                delete(job_events).where(
                    job_events.c.job_id == claim.job_id,
                    job_events.c.type == "progress",
                    job_events.c.number <= oldest,
                )
            )
            return self._get(connection, claim.job_id)

    def finish(
        self,
        claim: Claim,
        state: JobState,
        *,
        result: dict[str, Any] | None = None,
        error: JobFailure | None = None,
    ) -> Job | None:
        """Ends a claimed job; None where the lease is lost, and nothing is changed then."""
        text = None if result is None else json.dumps(result, ensure_ascii=False)
        with self._catalogue.writing() as connection:
            if not self._end(connection, _held(claim), state, result=text, error=error):
                return None
            self._event(connection, claim.job_id, "state", _state(state, error))
            return self._get(connection, claim.job_id)

    def give_up(self, claim: Claim, *, again: bool, error: JobFailure) -> Job | None:
        """For a runner that stops: queues the job again, or ends it as interrupted."""
        with self._catalogue.writing() as connection:
            if not self._release(connection, _held(claim), claim.job_id, again, error):
                return None
            return self._get(connection, claim.job_id)

    def recover(self, *, repeatable: Sequence[str], attempts: int, error: JobFailure) -> int:
        """Takes jobs from runners that let their lease lapse; how many there were.

        Those of a kind in `repeatable` are queued again until they were begun `attempts` times;
        others end as interrupted.
        """
        lapsed = (jobs.c.state == "running") & (jobs.c.lease_until < self._clock())
        query = select(jobs.c.id, jobs.c.kind, jobs.c.attempt, jobs.c.cancelling).where(lapsed)
        with self._catalogue.reading() as connection:
            if connection.execute(query).first() is None:
                return 0
        count = 0
        with self._catalogue.writing() as connection:
            for row in connection.execute(query).all():
                again = row.kind in repeatable and row.attempt < attempts and not row.cancelling
                count += self._release(connection, lapsed & _one(row.id), row.id, again, error)
        return count

    def prune(self, keep: int) -> None:
        """Forgets all finished jobs but the `keep` newest, and those whose files are read."""
        query = (
            select(jobs.c.id)
            .where(jobs.c.state.in_(FINISHED))
            .order_by(jobs.c.finished_at.desc(), jobs.c.id)
            .offset(keep)
        )
        with self._catalogue.reading() as connection:
            if connection.execute(query.limit(1)).first() is None:
                return
        with self._catalogue.writing() as connection:
            held = self._read_by(connection)
            found = connection.execute(query.limit(1000)).scalars()
            self._remove(connection, [job_id for job_id in found if job_id not in held])

    # Parts of transactions

    def _get(self, connection: Connection, job_id: str) -> Job:
        row = connection.execute(select(jobs).where(_one(job_id))).mappings().first()
        if row is None:
            raise UnknownArtefact(
                f"there is no job {job_id!r}: GET /v1/jobs lists those that are kept",
                code="unknown_job",
            )
        return job_of(row)

    def _read_by(self, connection: Connection) -> dict[str, str]:
        """The jobs whose files are read by one that has not finished, each with such a one."""
        named = jobs.c.request.like('%"states": {"job":%')
        query = select(jobs.c.id, jobs.c.request).where(jobs.c.state.not_in(FINISHED), named)
        found = {}
        for reader, request in connection.execute(query):
            states = json.loads(request).get("states")
            if isinstance(states, dict) and "job" in states:
                found[states["job"]] = reader
        return found

    def _event(
        self, connection: Connection, job_id: str, kind: EventType, data: dict[str, Any]
    ) -> None:
        # The count first: that locks the row, so that two writers never choose the same number.
        connection.execute(
            update(jobs).where(_one(job_id)).values(last_event=jobs.c.last_event + 1)
        )
        number = connection.execute(select(jobs.c.last_event).where(_one(job_id))).scalar_one()
        connection.execute(
            job_events.insert().values(
                job_id=job_id,
                number=number,
                type=kind,
                at=self._clock(),
                data=json.dumps(data, ensure_ascii=False),
            )
        )

    def _end(
        self,
        connection: Connection,
        which: ColumnElement[bool],
        state: JobState,
        *,
        result: str | None = None,
        error: JobFailure | None = None,
    ) -> bool:
        ended = connection.execute(
            update(jobs)
            .where(which)
            .values(
                state=state,
                finished_at=self._clock(),
                params=_EMPTY,
                owner=None,
                lease_until=None,
                result=result,
                error=None if error is None else json.dumps(asdict(error), ensure_ascii=False),
            )
        )
        return ended.rowcount > 0

    def _release(
        self,
        connection: Connection,
        which: ColumnElement[bool],
        job_id: str,
        again: bool,
        error: JobFailure,
    ) -> bool:
        if again:
            # What it had done stays to be seen until it begins again.
            changes = {"state": "queued", "owner": None, "lease_until": None}
            if not connection.execute(update(jobs).where(which).values(**changes)).rowcount:
                return False
            self._event(connection, job_id, "state", _state("queued", error))
            return True
        row = connection.execute(select(jobs.c.cancelling).where(which)).first()
        if row is None:
            return False
        state: JobState = "cancelled" if row.cancelling else "interrupted"
        reason = None if row.cancelling else error
        self._end(connection, which, state, error=reason)
        self._event(connection, job_id, "state", _state(state, reason))
        return True

    def _remove(self, connection: Connection, job_ids: Sequence[str]) -> None:
        connection.execute(delete(job_events).where(job_events.c.job_id.in_(job_ids)))
        connection.execute(delete(jobs).where(jobs.c.id.in_(job_ids)))


def _one(job_id: str) -> ColumnElement[bool]:
    return jobs.c.id == job_id


def _held(claim: Claim) -> ColumnElement[bool]:
    return (
        _one(claim.job_id)
        & (jobs.c.state == "running")
        & (jobs.c.owner == claim.owner)
        & (jobs.c.attempt == claim.attempt)
    )


def _for(model: str | None) -> ColumnElement[bool]:
    """Jobs that a server of `model` may run."""
    return or_(jobs.c.model.is_(None), jobs.c.model == model)


def _state(state: JobState, error: JobFailure | None) -> dict[str, Any]:
    return {"state": state} if error is None else {"state": state, "error": asdict(error)}
