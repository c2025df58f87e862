"""The fields that Steer adds to a whole response, on either route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from steer.engines.receipts import merged
from steer_server.generation.generation import Answer, Generation
from steer_server.generation.inspection.detectors import with_detections
from steer_server.generation.inspection.inspect_spec import InspectSpec
from steer_server.generation.inspection.inspected import inspected
from steer_server.generation.inspection.readouts import with_readouts
from steer_server.state import Serving


async def added_fields(
    serving: Serving,
    run: Generation,
    inspect: InspectSpec | None,
    found: Sequence[Answer],
    default: Sequence[Answer],
    choice: Callable[[Answer], Any],
) -> dict[str, Any]:
    """`steering`, `default` and `inspect`, each where the request has it; `choice` makes the
    route's own form of an answer."""
    fields: dict[str, Any] = {}
    receipt = merged(answer.receipt for answer in found)
    if receipt is not None:
        fields["steering"] = receipt.as_json()
    if default:
        fields["default"] = [choice(answer) for answer in default]
    if inspect is not None:
        fields["inspect"] = await inspected(
            serving, inspect, run.prompts[0], run.steering, run.sequences[0].roles
        )
    fields = with_readouts(fields, [entry for answer in found for entry in answer.readouts])
    return with_detections(fields, [entry for answer in found for entry in answer.detections])
