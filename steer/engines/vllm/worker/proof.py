"""The start-up proof: at every hook point steering acts, and doing nothing changes no bit.

One dummy pass is run in which the first token is not steered and each other one at a hook point of
its own. Each steered token must end in another hidden state than in a plain pass, the first in the
same to the bit: where a dummy request has several tokens, none comes before it. Each way in which
edits run is proved by itself: the compiled graph's constants, its operator, and, where the operator
is a kernel in CUDA graphs, the ranking of latents in it, and Python in passes without them.

Each site must also be what its name says: what an edit adds there arrives as it is, nothing of its
layer that comes before moves, and the streams after it move by as much as what is added to them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from steer.engines.proof import (
    States,
    edit_size,
    misplaced,
    probe_plan,
    probe_shift,
    ranking_plan,
    unchanged,
)
from steer.engines.vllm.ticket import CaptureOrder, Ticket
from steer.engines.vllm.worker.prepared import BatchTokens
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import Unsupported
from steer.model import INNER_SITES, HookPoint, ModelInfo
from steer.plan.plan import SteeringPlan
from steer.plan.selection import EVERYWHERE

_POINTS_AT_ONCE = 32


class Run(Protocol):
    """A dummy pass over so many tokens, without CUDA graphs where `graphless`: what this worker
    makes of them, `[>= T, ...]`; its last hidden states, or what it hands to the next stage of a
    pipeline."""

    def __call__(self, tokens: int, *, graphless: bool = False) -> Tensor: ...


class ProofPass(NamedTuple):
    """How the edits of a proof run: as constants, as what reads the state, or as what also ranks
    latents; without graphs."""

    kind: Literal["constant", "reading", "ranking"]
    graphless: bool = False

    def plan(self, model: ModelInfo, point: HookPoint) -> SteeringPlan:
        if self.kind == "ranking":
            return ranking_plan(model, point)
        return probe_plan(model, point, constant=self.kind == "constant")


@dataclass(frozen=True)
class _Probe:
    """A dummy request of one token: steered by `plan`, read at `read`."""

    plan: SteeringPlan | None
    read: tuple[HookPoint, ...] = ()


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
    ways = [ProofPass("constant"), ProofPass("reading")]
    if steering.edits.static:
        ways.append(ProofPass("ranking", graphless=True))
        if not steering.edits.graphless([(Ticket("", latents=2), _POINTS_AT_ONCE)]):
            ways.append(ProofPass("ranking"))
    for first in range(0, len(points), group):
        some = points[first : first + group]
        plain = {
            graphless: run(len(some) + 1, graphless=graphless)
            for graphless in dict.fromkeys(way.graphless for way in ways)
        }
        for way in ways:
            _prove_acts(steering, run, some, plain[way.graphless], way, experts=experts)
        _prove_places(steering, run, some)


def _prove_acts(
    steering: WorkerSteering,
    run: Run,
    points: Sequence[HookPoint],
    plain: Tensor,
    way: ProofPass,
    *,
    experts: bool,
) -> None:
    probes = [_Probe(way.plan(steering.model, point)) for point in points]
    steered, _ = _rehearse(steering, probes, run, graphless=way.graphless)
    for number, point in enumerate(points, 1):
        if torch.equal(steered[number], plain[number]) and not _is_idle(steering, run, point):
            raise _unproven(
                f"an edit at {point} of {steering.model.architecture} changes nothing on this vLLM",
            )
    if not unchanged(steered[0], plain[0], experts=experts):
        raise Unsupported(
            f"an unsteered token of {steering.model.architecture} is not what vLLM computes "
            "without steering beside it: the model is not served",
            code="neighbour_changed",
        )


def _is_idle(steering: WorkerSteering, run: Run, point: HookPoint) -> bool:
    """Whether the part around `point` adds the same whatever it reads, its weights being zero;
    False where its output cannot be read."""
    if point.site not in INNER_SITES:
        return False
    start, out = (
        HookPoint(point.layer, "resid_pre"),
        HookPoint(point.layer, INNER_SITES[point.site]),
    )
    if not {start.site, out.site} <= {*steering.model.sites}:
        return False
    plans = (None, probe_plan(steering.model, start, constant=False))
    one, other = (_read(steering, [_Probe(plan, (out,))], run)[0][out] for plan in plans)
    return torch.equal(one, other)


def _prove_places(steering: WorkerSteering, run: Run, points: Sequence[HookPoint]) -> None:
    """Raises `Unsupported` for a point at which an edit does something else than its name says."""
    layers = [
        tuple(
            HookPoint(point.layer, site)
            for site in steering.model.sites
            if steering.owns(HookPoint(point.layer, site))
        )
        for point in points
    ]
    dtype = getattr(torch, steering.model.dtype)
    unmoved = _read(steering, [_Probe(None, read) for read in layers], run)
    sizes = [edit_size(point.site, here) for point, here in zip(points, unmoved, strict=True)]
    probes = [
        _Probe(probe_plan(steering.model, point, constant=False, size=size), read)
        for point, size, read in zip(points, sizes, layers, strict=True)
    ]
    steered = _read(steering, probes, run)
    for point, size, before, after in zip(points, sizes, unmoved, steered, strict=True):
        moved = {at: state - before[at] for at, state in after.items()}
        shift = probe_shift(steering.model, point.site, size)
        wrong = misplaced(point, shift, moved, before, dtype)
        if wrong is not None:
            raise _unproven(
                f"{wrong} of {steering.model.architecture} does not move on this vLLM by what an "
                f"edit at {point} adds there",
            )


def _unproven(what: str) -> Unsupported:
    return Unsupported(
        f"{what}: the model is not served, because it would not be steered",
        code="steering_does_not_act",
    )


def _read(steering: WorkerSteering, probes: Sequence[_Probe], run: Run) -> list[States]:
    """What each probe reads: states leave a pass in Python, and so without a graph."""
    return _rehearse(steering, probes, run, graphless=steering.edits.static)[1]


def _rehearse(
    steering: WorkerSteering, probes: Sequence[_Probe], run: Run, *, graphless: bool
) -> tuple[Tensor, list[States]]:
    """A dummy pass in which token i belongs to probe i − 1, with tables of its own, and what each
    probe read; static buffers are the worker's, because the model's taps have no others."""
    plans = {str(n): probe.plan for n, probe in enumerate(probes) if probe.plan is not None}
    rehearsed = WorkerSteering(
        steering.model,
        plans.__getitem__,
        steering.edits.rehearsal(len(probes)),
        max_requests=len(probes),
        shifts=steering.shifts,
    )
    names = [str(n) for n in range(len(probes))]
    for name, probe in zip(names, probes, strict=True):
        rehearsed.admit(name, [0], _ticket(name, probe, graphless=graphless))
    tokens = len(probes) + 1
    each = np.zeros(tokens, dtype=np.int64)
    rehearsed.begin(BatchTokens(["nobody", *names], each, each + 1, lambda: each))
    try:
        made = run(tokens, graphless=graphless)
        return made, [_states(rehearsed, name) for name in names]
    finally:
        rehearsed.end()
        for name in names:
            rehearsed.retire(name)
        steering.recover()


def _ticket(name: str, probe: _Probe, *, graphless: bool) -> Ticket:
    capture = CaptureOrder(probe.read, (0,)) if probe.read else None
    if probe.plan is None:
        return Ticket(name, capture=capture)
    return Ticket(
        name,
        fingerprint=probe.plan.fingerprint,
        plan=name,
        selections=(EVERYWHERE,),
        latents=probe.plan.latents,
        graphless=graphless or probe.plan.graphless,
        onward=probe.plan.onward,
        capture=capture,
    )


def _states(steering: WorkerSteering, name: str) -> States:
    request = steering.requests.get(name)
    assert request is not None
    return request.states
