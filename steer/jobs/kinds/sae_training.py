"""Jobs that train an SAE on the serving model's states."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.bulk.kept import StatesEngine
from steer.fit.requests.saes.training import SAETrainingRequest
from steer.jobs.kinds.captured import reading_engine
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.model import HookPoint
from steer.registry.registry import Registry


def _check(engine: Engine, registry: Registry, request: SAETrainingRequest) -> None:
    reading = reading_engine(engine, registry, request)
    request.check(reading, registry)
    if isinstance(reading, StatesEngine):
        try:
            reading.check_kept(HookPoint(request.layer, request.site))
        except SteerError as error:
            raise error.at("/layer") from None


def _shown(request: SAETrainingRequest) -> dict[str, Any]:
    """How many texts came, and which labels, in their place."""
    return {"prompts": len(request.prompts), "labels": list(request.classes)}


def _train(context: JobContext, request: SAETrainingRequest) -> dict[str, Any]:
    engine = reading_engine(context.engine, context.registry, request)
    found = request.run(engine, context.counter)
    entry, created = context.registry.add(request.name, found.sae)
    request.forget(engine)
    return {
        "sae": entry.id,
        "name": entry.name,
        "version": entry.version,
        "sha256": entry.sha256,
        "created": created,
        "layers": list(found.sae.card.layers),
        "measures": found.measures.model_dump(),
        "loss": found.sae.card.provenance.get("loss"),
    }


TRAIN = JobKind(
    name="sae/train",
    params=SAETrainingRequest,
    run=_train,
    check=_check,
    summary="Trains an SAE on the model's own states of texts, and registers it.",
    data=frozenset(SAETrainingRequest.data),
    shown=_shown,
    repeatable=True,  # it goes on where it was ended
)
