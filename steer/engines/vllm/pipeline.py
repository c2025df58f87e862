"""Pipeline stages: each worker edits its own layers; what they tell is put together again.

Every stage computes the same tokens of the same requests, in the same order. A gate is decided in
one layer and rules others behind it, which may lie on later stages; so what gates decided travels
with the states (`handing_on`), and the last stage knows of all of them. Other stages know
of the gates up to their own end, and their receipts of no more.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Protocol

from steer.batch.gates import Decisions
from steer.engines.vllm.seams import replaced
from steer.errors import Unsupported
from steer.model import HookPoint, forward_order
from steer.plan.plan import Gate, SteeringPlan

Answers = Sequence[Mapping[int, Mapping[str, Any]]]
"""What one worker says to `steer_receipts`: for each request, its receipts by choice."""


class OwnLayers(Protocol):
    """The layers of one worker among those of the whole model."""

    def owns(self, point: HookPoint) -> bool:
        """Whether `point` lies in these layers."""

    def ends_before(self, point: HookPoint) -> bool:
        """Whether `point` lies behind them."""


def own_part(plan: SteeringPlan, stage: OwnLayers) -> SteeringPlan:
    """`plan` as `stage` runs it; its rules keep their numbers.

    They lose the edits of other stages, and a gate that reads behind this one, whose rule has no
    edits here. Raises `Unsupported` (`read_on_another_stage`) for an edit here that reads there.
    """
    for one in plan.rules:
        for point, block in one.blocks.items():
            if block.reads_at and stage.owns(point) and not stage.owns(block.reads_at):
                raise Unsupported(
                    f"the edit at {point} reads {block.reads_at}, which another stage of the "
                    "pipeline computes: clamp a transcoder that reads inside its layer",
                    code="read_on_another_stage",
                )
    rules = tuple(
        replace(
            one,
            gate=None if one.gate is None else _own_gate(one.gate, stage),
            blocks={point: block for point, block in one.blocks.items() if stage.owns(point)},
        )
        for one in plan.rules
    )
    return replace(plan, rules=rules)


def _own_gate(gate: Gate, stage: OwnLayers) -> Gate | None:
    if stage.ends_before(gate.point):
        return None
    return gate if stage.owns(gate.point) else replace(gate, elsewhere=True)


_OPENED, _READ = "steer_gates_opened", "steer_gates_read"
"""The names that decisions have among the tensors of a stage."""


class HandsOn(Protocol):
    """A worker's steering, as far as it hands on what gates decided (`WorkerSteering`)."""

    stages: int

    def receive(self, decisions: Decisions) -> None:
        """An earlier stage has decided this in the coming pass."""

    def decisions(self) -> Decisions | None:
        """What gates have decided in the last pass; None where nobody has one."""


def handing_on(runner: Any, steering: HandsOn) -> AbstractContextManager[None]:
    """Inside the block, what gates decided comes to `runner`, a model runner of vLLM's, with the
    states that it is given, and goes on with those that it makes.

    A model that is not split into stages has nothing to hand on.
    """
    if steering.stages == 1:
        return nullcontext()
    execute = runner.execute_model

    def execute_model(output: Any, given: Any = None, *args: Any, **named: Any) -> Any:
        # Names are here before the tensors are, and nobody waits for these without need.
        if given is not None and _OPENED in vars(given)["tensors"]:
            steering.receive(Decisions(given.tensors.pop(_OPENED), given.tensors.pop(_READ)))
        made = execute(output, given, *args, **named)
        states: Any = getattr(made, "tensors", None)
        decided = None if states is None else steering.decisions()
        if decided is None:
            return made
        return type(made)({**states, _OPENED: decided.opened, _READ: decided.values})

    return replaced(runner, "execute_model", execute_model)


def merged_answers(workers: Sequence[Answers]) -> list[dict[int, dict[str, Any]]]:
    """One answer to `steer_receipts` from those of all workers, in the order of the requests.

    A worker that did not steer a request, and workers that disagree about its tokens, make its
    answer an error. The last worker is one of the last stage, which knows all gates.
    """
    return [
        {
            choice: _merged([worker.get(choice, _MISSING) for worker in request])
            for choice in dict.fromkeys(choice for worker in request for choice in worker)
        }
        for request in zip(*workers, strict=True)
    ]


def gathered_answers(engines: Sequence[Sequence[Answers]]) -> list[dict[int, dict[str, Any]]]:
    """As `merged_answers`, where each choice of a request ran on one of several engines."""
    answers = [merged_answers(workers) for workers in engines]
    if len(answers) == 1:
        return answers[0]
    return [
        {
            choice: next(
                (one[choice] for one in found if choice in one and not is_unknown(one[choice])),
                dict(_MISSING),
            )
            for choice in dict.fromkeys(choice for one in found for choice in one)
        }
        for found in zip(*answers, strict=True)
    ]


def readout_answers(
    engines: Sequence[Sequence[Answers]],
) -> list[dict[int, list[Mapping[str, Any]]]]:
    """For each request that `steer_readouts` was asked about, in order, what the workers that ran
    each of its choices say."""
    workers = [worker for engine in engines for worker in engine]
    return [
        {
            choice: [worker[choice] for worker in request if choice in worker]
            for choice in dict.fromkeys(choice for worker in request for choice in worker)
        }
        for request in zip(*workers, strict=True)
    ]


_UNKNOWN = "unknown"


def unknown_answer() -> dict[str, Any]:
    """What a worker says of a request that it never ran."""
    return {"error": "this worker knows nothing of the request", _UNKNOWN: True}


def is_unknown(answer: Mapping[str, Any]) -> bool:
    """Whether the worker never ran the request."""
    return bool(answer.get(_UNKNOWN, False))


_MISSING = {"error": "one of the workers knows nothing of the request"}
_COUNTS = ("tokens_steered", "tokens_cached")


def _merged(receipts: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    for one in receipts:
        if "error" in one:
            return dict(one)
    if _disagree(receipts):
        return {
            "error": "the workers do not agree on which tokens they steered, so the answer is "
            "withheld",
            "code": "workers_disagree",
        }
    points: dict[HookPoint, Any] = {}
    for one in receipts:
        for entry in one["hook_points"]:
            points.setdefault(HookPoint(entry["layer"], entry["site"]), entry)
    ordered = [points[point] for point in sorted(points, key=forward_order)]
    return {**receipts[-1], "hook_points": ordered}


def _disagree(receipts: Sequence[Mapping[str, Any]]) -> bool:
    """Whether workers fed other tokens, or, knowing the same gates, steered others."""
    alike: dict[int, Mapping[str, Any]] = {}
    fed = {(one["fingerprint"], one["tokens_steered"] + one["tokens_skipped"]) for one in receipts}
    return len(fed) > 1 or any(
        one[name] != alike.setdefault(len(one["gates"]), one)[name]
        for one in receipts
        for name in _COUNTS
    )
