"""The start-up proof: at every tap steering acts, and doing nothing changes no bit.

One dummy pass is run in which the first token is not steered and each other one at a hook point of
its own. Each steered token must end in another hidden state than in a plain pass, the first in the
same to the bit: where a dummy request has several tokens, none comes before it. Each way in which
edits run is proved by itself: the compiled graph's constants, its operator, and, where the operator
is a kernel in CUDA graphs, Python in passes without them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from steer.engines.proof import probe_plan, unchanged
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.prepared import BatchTokens
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.plan.selection import EVERYWHERE

_POINTS_AT_ONCE = 32


class Run(Protocol):
    """A dummy pass over so many tokens, without CUDA graphs where `graphless`: what this worker
    makes of them, `[>= T, ...]`; its last hidden states, or what it hands to the next stage of a
    pipeline."""

    def __call__(self, tokens: int, *, graphless: bool = False) -> Tensor: ...


class Way(NamedTuple):
    """How the edits of a proof run: as constants or as what reads the state; without graphs."""

    constant: bool
    graphless: bool


def prove(steering: WorkerSteering, run: Run, largest: int, *, experts: bool) -> None:
    """Raises `Unsupported` naming the first hook point at which an edit does not act.

    `largest` is the most tokens that one dummy pass may have; `experts` is whether the model is a
    mixture of experts.
    """
    points = [
        HookPoint(layer, site)
        for layer in range(steering.model.n_layers)
        for site in steering.model.sites
        if steering.owns(HookPoint(layer, site))
    ]
    group = max(min(largest, steering.edits.tables.slots, _POINTS_AT_ONCE + 1) - 1, 1)
    ways = [Way(constant=True, graphless=False), Way(constant=False, graphless=False)]
    if steering.edits.static:
        ways.append(Way(constant=False, graphless=True))
    for way in ways:
        for first in range(0, len(points), group):
            _prove_points(steering, run, points[first : first + group], way, experts)


def _prove_points(
    steering: WorkerSteering, run: Run, points: Sequence[HookPoint], way: Way, experts: bool
) -> None:
    plans = {
        f"{point}": probe_plan(steering.model, point, constant=way.constant) for point in points
    }
    tokens = len(points) + 1
    plain = run(tokens, graphless=way.graphless)
    steered = _rehearse(steering, plans, run, tokens, graphless=way.graphless)
    for number, point in enumerate(points, 1):
        if torch.equal(steered[number], plain[number]):
            raise Unsupported(
                f"an edit at {point} of {steering.model.architecture} changes nothing on this "
                "vLLM: the model is not served, because it would not be steered",
                code="steering_does_not_act",
            )
    if not unchanged(steered[0], plain[0], experts=experts):
        raise Unsupported(
            f"an unsteered token of {steering.model.architecture} is not what vLLM computes "
            "without steering beside it: the model is not served",
            code="neighbour_changed",
        )


def _rehearse(
    steering: WorkerSteering,
    plans: Mapping[str, SteeringPlan],
    run: Run,
    tokens: int,
    *,
    graphless: bool,
) -> Tensor:
    """A dummy pass in which token i belongs to plan i − 1, with tables of its own; static buffers
    are the worker's, because the model's taps have no others."""
    rehearsed = WorkerSteering(
        steering.model,
        plans.__getitem__,
        steering.edits.rehearsal(len(plans)),
        max_requests=len(plans),
        shifts=steering.shifts,
    )
    names = list(plans)
    for name in names:
        ticket = Ticket(
            name,
            fingerprint=plans[name].fingerprint,
            plan=name,
            selections=(EVERYWHERE,),
            competes=graphless,  # what such plans run by, though these compete for nothing
        )
        rehearsed.admit(name, [0], ticket)
    each = np.zeros(tokens, dtype=np.int64)
    token = np.zeros(1, dtype=np.int64)
    rehearsed.begin(BatchTokens(["nobody", *names], each, each + 1, lambda _: token))
    try:
        return run(tokens, graphless=graphless)
    finally:
        rehearsed.end()
        for name in names:
            rehearsed.retire(name)
        steering.recover()
