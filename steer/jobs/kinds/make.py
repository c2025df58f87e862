"""Jobs of the kind `make`: from a sentence to a calibrated vector."""

from __future__ import annotations

from typing import Any

from steer.engines.base import Engine
from steer.errors import Unsupported
from steer.fit.requests.make import MakeRequest
from steer.jobs.client_scorers import client_scorer
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.registry.registry import Registry


def _check(engine: Engine, registry: Registry, request: MakeRequest) -> None:
    if not engine.capabilities.captures:
        raise Unsupported(
            "this engine cannot read activations, which making a vector needs: GET "
            "/v1/steering/capabilities says what it can",
            code="no_captures",
        )
    if request.score is not None:
        client_scorer(request.score, registry.vector)
    request.check(engine)


def _run(context: JobContext, request: MakeRequest) -> dict[str, Any]:
    scorer = None
    if request.score is not None:
        scorer = client_scorer(request.score, context.registry.vector)
    found = request.run(
        context.engine,
        scorer,
        progress=context.counter(request.work(context.engine), "making a vector"),
    )
    entry, created = context.registry.add(request.name, found.vector)
    return {
        **found.as_json(),
        "vector": entry.id,
        "version": entry.version,
        "sha256": entry.sha256,
        "created": created,
    }


MAKE = JobKind(
    name="make",
    params=MakeRequest,
    run=_run,
    check=_check,
    summary="Makes a vector that does what a sentence asks for, and registers it calibrated.",
    data=frozenset({"prompts"}),
    shown=lambda request: {} if request.prompts is None else {"prompts": len(request.prompts)},
    repeatable=True,  # the same content again is no new version
)
