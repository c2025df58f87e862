"""A small model whose layers lie on one worker or on several stages of a pipeline, without vLLM.

A crowd of requests with gates goes through both: prompts in pieces, preemption, tokens that are
computed again. What a pipeline makes of them must be what one worker does.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from artefacts import (
    EVERYTHING,
    SCOPES,
    artefacts,
    random_detection,
    random_spec,
    shape_of,
)
from pieces import drawn_pieces
from torch import Tensor, nn

from steer.artefacts.library import MemoryLibrary
from steer.engines.vllm.pipeline import handing_on, merged_answers, own_part
from steer.engines.vllm.taps.layer_streams import FusedAdd
from steer.engines.vllm.taps.taps import SITES, DecoderStack
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.answers import receipt_answer
from steer.engines.vllm.worker.edits import Edits
from steer.engines.vllm.worker.prepared import BatchTokens
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import SteerError
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

WIDTH, LAYERS, VOCABULARY, RUNNING, BATCH = 24, 5, 64, 4, 40
MODEL = replace(shape_of(WIDTH, LAYERS), sites=SITES)
PLANS = PlanCache(MemoryLibrary(**artefacts(WIDTH, LAYERS)), MODEL, EVERYTHING)
_generator = torch.Generator().manual_seed(12)
EMBEDDING = torch.randn(VOCABULARY, WIDTH, generator=_generator)
WEIGHTS = torch.randn(2 * LAYERS + 1, WIDTH, WIDTH, generator=_generator) / WIDTH**0.5

Visit = Callable[[Edits, int, Tensor, Tensor], None]
"""Shows the halves of the stream at a tap to the edits of a worker."""


@dataclass
class States:
    """What stages hand on, as vLLM holds it."""

    tensors: dict[str, Tensor]


class Worker:
    """One stage: its layers, its steering, and the `execute_model` that vLLM calls."""

    def __init__(
        self,
        layers: range,
        stages: int,
        plans: Mapping[str, SteeringPlan],
        make: Callable[[DecoderStack], Edits],
        visit: Visit,
    ) -> None:
        stack = DecoderStack([(n, nn.Identity()) for n in layers], FusedAdd("middle"), LAYERS)
        self._taps, self._last, self._visit = stack.taps, layers.stop == LAYERS, visit
        self.steering = WorkerSteering(
            MODEL,
            (lambda name: plans[name]) if stages == 1 else (lambda n: own_part(plans[n], stack)),
            make(stack),
            max_requests=RUNNING,
            owns=stack.owns,
            stages=stages,
        )

    def run(self, batch: BatchTokens, given: States) -> Any:
        with handing_on(self, self.steering):
            return self.execute_model(batch, given)

    def execute_model(self, batch: BatchTokens, given: States) -> Any:
        assert given.tensors.keys() == {"hidden", "residual"}
        hidden, residual = given.tensors["hidden"], given.tensors["residual"]
        self.steering.begin(batch)
        for tap in self._taps:
            self._visit(self.steering.edits, tap, hidden, residual)
            stream = hidden + residual
            hidden, residual = torch.tanh(stream @ WEIGHTS[tap]), stream
        self.steering.end()
        made = States({"hidden": hidden, "residual": residual})
        return made.tensors["hidden"] + made.tensors["residual"] if self._last else made


class Pipeline:
    """Workers behind one another; the first layer of each but the first is in `cuts`."""

    def __init__(
        self,
        cuts: Sequence[int],
        plans: Mapping[str, SteeringPlan],
        make: Callable[[DecoderStack], Edits],
        visit: Visit,
    ) -> None:
        bounds = pairwise([0, *cuts, LAYERS])
        self.workers = [
            Worker(range(start, end), len(cuts) + 1, plans, make, visit) for start, end in bounds
        ]

    def admit(self, name: str, prompt: list[int], ticket: Ticket) -> None:
        for worker in self.workers:
            worker.steering.admit(name, prompt, ticket)

    def retire(self, name: str) -> None:
        for worker in self.workers:
            worker.steering.retire(name)

    def step(self, batch: BatchTokens, x: Tensor) -> Tensor:
        """The last states `[T, d]` of the tokens whose embeddings are `x`."""
        made: Any = States({"hidden": x / 3, "residual": x * 2 / 3})
        for worker in self.workers:
            made = worker.run(batch, made)
        return torch.as_tensor(made)

    def receipt(self, name: str, fed: int) -> dict[str, Any]:
        """What the workers together say of a request that has ended."""
        answers = [
            [receipt_answer(worker.steering.requests, name, {0: fed})] for worker in self.workers
        ]
        return merged_answers(answers)[0][0]


@dataclass
class Request:
    name: str
    tokens: list[int]
    prompt_length: int
    ticket: Ticket
    computed: int = 0


def gated_plan(draw: random.Random) -> SteeringPlan:
    """A random spec behind a gate at any layer that comes before its edits."""
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=3)
        raw["when"] = random_detection(draw) if draw.random() < 0.4 else _random_direction(draw)
        try:
            return PLANS.plan(parse_spec(raw))
        except SteerError:
            continue


def _random_direction(draw: random.Random) -> dict[str, Any]:
    return {
        "vector": draw.choice(["v0", "v1"]),
        draw.choice(["above", "below"]): draw.uniform(-0.2, 0.2),
        "scope": draw.choice(SCOPES),
        "layer": draw.randrange(LAYERS),
    }


def random_request(draw: random.Random, number: int, plan: SteeringPlan) -> Request:
    length = draw.randint(1, 12)
    tokens = [draw.randrange(VOCABULARY) for _ in range(length + draw.randint(1, 10))]
    ticket = Ticket(
        f"r{number}",
        fingerprint=plan.fingerprint,
        plan=plan.fingerprint,
        selections=plan.selections,
        measure=draw.random() < 0.3,
        latents=plan.latents,
        graphless=plan.graphless,
        onward=plan.onward,
    )
    return Request(ticket.key, tokens, length, ticket)


def assert_stages_do_what_one_worker_does(
    seed: int,
    cuts: Sequence[int],
    make: Callable[[DecoderStack], Edits],
    visit: Visit,
    *,
    requests: int = 40,
) -> None:
    """States keep their bits, and receipts are equal; gates of either scope open and stay shut."""
    draw = random.Random(seed)
    plans = {plan.fingerprint: plan for plan in (gated_plan(draw) for _ in range(12))}
    pipelines = [Pipeline(at, plans, make, visit) for at in ((), cuts)]
    chosen = list(plans.values())
    waiting = [random_request(draw, n, draw.choice(chosen)) for n in range(requests)]
    running: list[Request] = []
    fired: set[tuple[bool, bool]] = set()
    while waiting or running:
        while waiting and len(running) < RUNNING and draw.random() < 0.7:
            new = waiting.pop(draw.randrange(len(waiting)))
            for pipeline in pipelines:
                pipeline.admit(new.name, new.tokens[: new.prompt_length], new.ticket)
            running.append(new)
        if running and draw.random() < 0.15:  # it waits, and its tokens are computed again
            gone = running.pop(draw.randrange(len(running)))
            gone.computed = 0
            waiting.append(gone)
        draw.shuffle(running)
        if running:
            one, several = _step(draw, pipelines, running)
            assert torch.equal(one, several)
        for request in [one for one in running if one.computed == len(one.tokens)]:
            running.remove(request)
            for pipeline in pipelines:
                pipeline.retire(request.name)
            expected, found = (p.receipt(request.name, request.computed) for p in pipelines)
            assert expected == found
            gates = expected["gates"]
            fired |= {(gate["value"] is None, gate["fired"] > 0) for gate in gates}
    assert len(fired) == 4


def _step(
    draw: random.Random, pipelines: Sequence[Pipeline], running: Sequence[Request]
) -> list[Tensor]:
    batch, tokens, counts = drawn_pieces(draw, running)
    x = EMBEDDING[tokens]
    for one, count in zip(running, counts, strict=True):
        one.computed += count
    return [pipeline.step(batch, x.clone()) for pipeline in pipelines]
