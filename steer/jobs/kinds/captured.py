"""Jobs that take their states from what a capture has kept, and do not run the model."""

from __future__ import annotations

from typing import TypeVar

from pydantic import BaseModel

from steer.engines.base import Engine
from steer.errors import Conflict, SteerError, UnknownArtefact
from steer.fit.bulk.kept import StatesEngine
from steer.fit.requests.fields import CaptureRef
from steer.registry.registry import Registry

_AT = "/states/job"
R = TypeVar("R", bound=BaseModel)


def capture_of(request: BaseModel) -> str | None:
    """The capture job that `request` names, if it names one."""
    named = getattr(request, "states", None)
    return named.job if isinstance(named, CaptureRef) else None


def reading_engine(engine: Engine, registry: Registry, request: BaseModel) -> Engine:
    """What `request` reads from: `engine`, or the states of the capture that it names.

    Raises `SteerError` at the field: `unknown_job`, `not_a_capture`, `job_not_finished`,
    `no_capture` (its files are on another machine), `states_not_kept` (of another model, pooled or
    steered).
    """
    job_id = capture_of(request)
    if job_id is None:
        return engine
    try:
        return _kept(engine, registry, job_id)
    except SteerError as error:
        error.param = _AT
        raise


def with_layers(request: R, engine: Engine) -> R:
    """`request`, which of kept states reads those layers that there are unless it names some."""
    if isinstance(engine, StatesEngine) and getattr(request, "layers", 0) is None:
        return request.model_copy(update={"layers": engine.layers})
    return request


def _kept(engine: Engine, registry: Registry, job_id: str) -> StatesEngine:
    job = registry.jobs.get(job_id)
    if job.kind != "capture":
        raise SteerError(
            f"the job {job_id!r} is of kind {job.kind!r}, and states are kept by those of kind "
            "'capture': name one of them",
            code="not_a_capture",
        )
    if job.state != "succeeded":
        raise Conflict(
            f"the capture {job_id!r} is {job.state}: its states can be read when it has succeeded",
            code="job_not_finished",
        )
    folder = registry.job_outputs.folder(job_id)
    if not folder.is_dir():
        raise UnknownArtefact(
            f"the files of {job_id!r} are not on this machine: ask the server that made them, or "
            "capture again",
            code="no_capture",
        )
    kept = StatesEngine(folder, engine.tokenizer)
    if not engine.info.is_called(kept.info.own_name):
        raise SteerError(
            f"{job_id!r} holds states of {kept.info.own_name!r}, and the model here is "
            f"{engine.info.own_name!r}: name a capture of this one",
            code="states_not_kept",
        )
    return kept
