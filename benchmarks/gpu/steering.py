"""Requests that are steered in the static form, as a worker of vLLM does it, without vLLM."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from benchmarks.gpu.device import Device
from benchmarks.vllm.diets import Batch
from benchmarks.vllm.shapes import CAPABILITIES, FEATURES, Shape, library
from steer.batch.ledger import PositionLedger
from steer.batch.requests import Span, SteeredRequest
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.static.operators import set_form
from steer.engines.vllm.static.passes import StaticPass
from steer.engines.vllm.taps.shifts import ShiftTables
from steer.engines.vllm.taps.taps import CompiledTap, OpaqueTap, tap_of
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

EDIT_ROWS = 8192
_PROMPT = 4


@dataclass(frozen=True)
class Load:
    """T tokens of a pass: so many of each request, all generated, by its own plan or none."""

    plans: Sequence[SteeringPlan | None]
    each: int

    @property
    def tokens(self) -> int:
        return len(self.plans) * self.each


class Steering:
    """The static buffers of one worker on `device`, and the taps that read them.

    Assumes: at most `requests` requests with `tokens` tokens in a pass; one of these in a process
    at a time, because operators know one.
    """

    def __init__(self, shape: Shape, device: Device, *, requests: int, tokens: int) -> None:
        self.shape, self.device = shape, device
        self.model = shape.info(_PROMPT + tokens + 1)
        taps = range(2 * shape.layers + 1)
        self.form = StaticForm(
            self.model,
            taps,
            max_requests=requests,
            batch_tokens=tokens,
            edit_rows=EDIT_ROWS,
            device=device.torch,
            latents=FEATURES * tokens,
        )
        self.ledger = PositionLedger(requests, _PROMPT + tokens + 1, device.torch)
        self.form.bind(lambda: self.ledger)
        set_form(self.form)
        self.shifts = ShiftTables(
            len(taps),
            shape.d_model,
            variants=2 * requests + 1,
            bank_rows=1 + requests * shape.layers,
            batch_tokens=tokens,
            device=device.torch,
        )
        self._plans = PlanCache(library(shape), self.model, CAPABILITIES)
        self._held: list[SteeringPlan] = []

    def tap(self, index: int) -> nn.Module:
        """A tap as compiled engines have it: constants in the graph, the rest in the operator."""
        return CompiledTap(index, self.shifts, OpaqueTap(index, static=True))

    def plans(self, specs: Batch) -> list[SteeringPlan | None]:
        return [None if one is None else self._plans.plan(parse_spec(one)) for one in specs]

    def idle(self) -> None:
        """Nobody is steered in the passes that come."""
        self._release()
        self.form.clear()
        self.shifts.rest()

    def begin(self, load: Load, *, inline: bool) -> StaticPass | None:
        """Makes `load` what the taps do. With `inline`, constants are added in the graph, as far
        as plans are nothing else; otherwise all goes through the operator."""
        self.idle()
        carried = [
            inline and one is not None and self.shifts.carries(one) for one in load.plans
        ]  # fmt: skip
        self.shifts.assign(self._variants(load, carried))
        spans = []
        for number, (plan, in_graph) in enumerate(zip(load.plans, carried, strict=True)):
            if plan is None or in_graph:
                continue
            slot = self.form.tables.acquire(plan)
            self._held.append(plan)
            self.ledger.reset(number)
            request = SteeredRequest(number, _PROMPT, plan, slot)
            positions = _PROMPT + np.arange(load.each)
            spans.append(Span(request, number * load.each, positions, positions))
        return self.form.begin(spans, load.tokens, _fault)

    def _variants(self, load: Load, carried: Sequence[bool]) -> torch.Tensor:
        numbers = [0] * len(load.plans)
        for n, (plan, in_graph) in enumerate(zip(load.plans, carried, strict=True)):
            if plan is not None and in_graph:
                found = self.shifts.find(plan, (1 << len(plan.rules)) - 1, tap_of, frozenset())
                if found is None:
                    raise RuntimeError("the constants of the graph are full")
                numbers[n] = found
        return torch.tensor(numbers, dtype=torch.long).repeat_interleave(load.each)

    def _release(self) -> None:
        for plan in self._held:
            self.form.tables.release(plan)
        self._held = []


def _fault(message: str) -> None:
    raise RuntimeError(message)
