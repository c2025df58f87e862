"""Pipeline stages: each worker edits its own layers; what they tell is put together again.

Every stage computes the same tokens of the same requests, so their receipts differ in the hook
points alone. A gate is decided in one layer and rules others, which may lie on another stage that
runs at another time; so plans with gates are refused where there is more than one stage.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from steer.errors import Unsupported
from steer.model import HookPoint, forward_order
from steer.plan.plan import SteeringPlan

Answers = Sequence[Mapping[int, Mapping[str, Any]]]
"""What one worker says to `steer_receipts`: for each request, its receipts by choice."""


def check_gates(plan: SteeringPlan, stages: int) -> None:
    """Raises `Unsupported` for a plan with gates where the model runs in several stages."""
    if stages > 1 and plan.gated:
        raise Unsupported(
            f"this engine runs the model in {stages} pipeline stages, and a gate cannot rule "
            "layers of another stage: send the spec without 'when', or start the engine with "
            "tensor parallelism instead",
            code="gates_across_stages",
            param="/when",
        )


def own_part(plan: SteeringPlan, owns: Callable[[HookPoint], bool]) -> SteeringPlan:
    """`plan` without the edits of other stages; its rules keep their numbers.

    Raises `Unsupported` for a plan with gates.
    """
    check_gates(plan, stages=2)
    rules = tuple(
        replace(one, blocks={point: block for point, block in one.blocks.items() if owns(point)})
        for one in plan.rules
    )
    return replace(plan, rules=rules)


def merged_answers(workers: Sequence[Answers]) -> list[dict[int, dict[str, Any]]]:
    """One answer to `steer_receipts` from those of all workers, in the order of the requests.

    A worker that did not steer a request, and workers that disagree about its tokens, make its
    answer an error.
    """
    return [
        {
            choice: _merged([worker.get(choice, _MISSING) for worker in request])
            for choice in dict.fromkeys(choice for worker in request for choice in worker)
        }
        for request in zip(*workers, strict=True)
    ]


_MISSING = {"error": "one of the workers knows nothing of the request"}
_SHARED = ("fingerprint", "tokens_steered", "tokens_skipped", "tokens_cached")


def _merged(receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for one in receipts:
        if "error" in one:
            return dict(one)
    first = receipts[0]
    if any(one[name] != first[name] for one in receipts for name in _SHARED):
        return {
            "error": "the workers do not agree on which tokens they steered, so the answer is "
            "withheld",
            "code": "workers_disagree",
        }
    points: dict[HookPoint, Any] = {}
    for one in receipts:
        for entry in one["hook_points"]:
            points.setdefault(HookPoint(entry["layer"], entry["site"]), entry)
    return {**first, "hook_points": [points[point] for point in sorted(points, key=forward_order)]}
