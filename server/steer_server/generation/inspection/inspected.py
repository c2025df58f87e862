"""Carries out the `inspect` field of a completion."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from steer.errors import SteerError
from steer.inspection.logit_lens import LogitLensRequest, logit_lens
from steer.prompts.roles import RoleRanges
from steer_server.generation.inspection.inspect_spec import InspectSpec
from steer_server.generation.steering import Steering
from steer_server.state import Serving


async def inspected(
    serving: Serving,
    spec: InspectSpec,
    prompt: Sequence[int],
    steering: Steering,
    roles: RoleRanges | None = None,
) -> dict[str, Any]:
    """What `spec` reads from the tokens of `prompt`, steered; `roles` are those of its messages."""
    return await serving.inspections.run(
        lambda: _logit_lens(serving, spec, tuple(prompt), steering, roles)
    )


def _logit_lens(
    serving: Serving,
    spec: InspectSpec,
    prompt: tuple[int, ...],
    steering: Steering,
    roles: RoleRanges | None,
) -> dict[str, Any]:
    request = LogitLensRequest(
        tokens=prompt,
        layers="all" if spec.layers is None else spec.layers,
        positions=spec.positions,
        top=spec.top,
        steering=None if steering.plan is None else steering.plan.spec,
    )
    try:
        result = logit_lens(serving.engine, request, plans=serving.plans, roles=roles)
    except SteerError as error:
        error.param = "/inspect" + (error.param or "")
        raise
    return result.model_dump(mode="json", exclude_none=True)
