"""Carries out the `inspect` field of a completion."""

from __future__ import annotations

from typing import Any

from anyio import to_thread

from steer.errors import SteerError
from steer.inspection.logit_lens import LogitLensRequest, logit_lens
from steer_server.generation import Generation
from steer_server.inspect_spec import InspectSpec
from steer_server.state import Serving


async def inspected(serving: Serving, spec: InspectSpec, run: Generation) -> dict[str, Any]:
    """What `spec` reads from the first prompt of `run`, under its steering."""
    return await to_thread.run_sync(_logit_lens, serving, spec, run)


def _logit_lens(serving: Serving, spec: InspectSpec, run: Generation) -> dict[str, Any]:
    request = LogitLensRequest(
        tokens=run.prompts[0],
        layers="all" if spec.layers is None else spec.layers,
        positions=spec.positions,
        top=spec.top,
        steering=None if run.steering.plan is None else run.steering.plan.spec,
    )
    try:
        result = logit_lens(serving.engine, request, plans=serving.plans)
    except SteerError as error:
        error.param = "/inspect" + (error.param or "")
        raise
    return result.model_dump(mode="json", exclude_none=True)
