"""The catalogue's tables for jobs and what happened to them."""

from __future__ import annotations

from sqlalchemy import Boolean, Column, DateTime, Index, Integer, String, Table, Text

from steer.registry.catalogue.schema import metadata

jobs = Table(
    "jobs",
    metadata,
    Column("id", String(36), primary_key=True),
    Column("kind", String(64), nullable=False),
    Column("state", String(16), nullable=False),
    # What its run is given, as JSON; emptied when it has finished, because it may be large.
    Column("params", Text, nullable=False),
    # The same as clients see it, without the data, as JSON.
    Column("request", Text, nullable=False),
    # Who may run it: servers of this model, and those that see this folder of files. Null: any.
    Column("model", String(512)),
    Column("place", String(36)),
    Column("created_at", DateTime, nullable=False),  # UTC, without a zone, as all times here
    Column("started_at", DateTime),
    Column("finished_at", DateTime),
    # The lease: who runs it, until when that holds, and how often it has been begun.
    Column("owner", String(36)),
    Column("lease_until", DateTime),
    Column("attempt", Integer, nullable=False),
    Column("cancelling", Boolean, nullable=False),
    Column("done", Integer, nullable=False),
    Column("total", Integer),
    Column("note", Text, nullable=False),
    Column("last_event", Integer, nullable=False),
    Column("result", Text),  # JSON
    Column("error", Text),  # JSON: code, message, param
)
Index("jobs_by_state", jobs.c.state, jobs.c.created_at)
Index("jobs_by_time", jobs.c.created_at)

job_events = Table(
    "job_events",
    metadata,
    Column("job_id", String(36), primary_key=True),
    Column("number", Integer, primary_key=True),
    Column("type", String(16), nullable=False),
    Column("at", DateTime, nullable=False),
    Column("data", Text, nullable=False),  # JSON
)
