"""Jobs that keep the states of a whole data set in files, for clients to fetch."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.errors import Unsupported
from steer.fit.bulk.capturing import CaptureLimits
from steer.fit.requests.inline import count
from steer.fit.requests.states import StatesRequest
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.limits import CaptureRoom
from steer.plan.resolve import Policy
from steer.registry.registry import Registry


def capture_kind(policy: Policy, room: CaptureRoom) -> JobKind[StatesRequest]:
    """Captures under specs that `policy` allows, within `room`."""

    def check(engine: Engine, registry: Registry, request: StatesRequest) -> None:
        if room.bytes == 0:
            raise Unsupported(
                "this server keeps no states of data sets: its operator allows them with "
                "STEER_CAPTURE_BYTES, and 'steer capture' makes them without a server",
                code="no_captures",
            )
        request.taken()
        request.check(engine, plans_of(engine, registry, policy=policy).plan)

    def run(context: JobContext, request: StatesRequest) -> dict[str, Any]:
        folder = context.outputs
        assert folder is not None, "a runner gives its jobs a folder"
        beside = context.registry.job_outputs.bytes_beside(folder.name)
        card = request.run(
            context.engine,
            folder,
            plan_of=plans_of(context.engine, context.registry, policy=policy).plan,
            limits=CaptureLimits(room.rows, max(0, room.bytes - beside)),
            counter=context.counter,
        )
        return {
            "model": card.model,
            "points": [one.model_dump() for one in card.points],
            "stored": card.dtype,
            "texts": card.texts,
            "rows": card.rows,
            "bytes": card.bytes,
            "files": len(card.shards),
            "steering": card.steering,
            "data": card.data,
        }

    return JobKind(
        name="capture",
        params=StatesRequest,
        run=run,
        check=check,
        summary="Reads texts through the model, and keeps its states in files to be fetched.",
        data=frozenset(StatesRequest.data_fields),
        shown=lambda request: {"prompts": count(request.prompts, request.data)},
        repeatable=True,  # it goes on where it was ended
    )
