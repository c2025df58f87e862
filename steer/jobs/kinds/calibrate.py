"""Jobs of the kind `calibrate`: what each strength of a vector does, written onto its card."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.requests.measuring import CalibrateRequest
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.jobs.kinds.sweep import at_field, check_answers, shown
from steer.registry.registry import Registry


def _check(engine: Engine, registry: Registry, request: CalibrateRequest) -> None:
    if request.score is not None:
        client_scorer(request.score, registry.vector)
    check_answers(request.answers, len(request.prompts))
    try:
        request.check(engine, registry.vector(request.vector))
    except SteerError as error:
        raise at_field(error) from None


def _run(context: JobContext, request: CalibrateRequest) -> dict[str, Any]:
    vectors = context.registry.vector
    plain = vectors(request.vector)
    found = request.run(
        context.engine,
        plain,
        None if request.score is None else client_scorer(request.score, vectors),
        progress=context.counter(request.answers, "answers"),
    )
    entry, created = context.registry.add(plain.card.name, found.vector)
    return {
        **found.as_json(),
        "vector": entry.id,
        "version": entry.version,
        "sha256": entry.sha256,
        "created": created,
    }


# It measures beyond a limit of strengths, which is what sets the limit.
CALIBRATE = JobKind(
    name="calibrate",
    params=CalibrateRequest,
    run=_run,
    check=_check,
    summary="Measures what each strength of a vector does, and registers the calibrated version.",
    data=frozenset({"prompts"}),
    shown=shown,
    repeatable=True,  # the same content again is no new version
)
