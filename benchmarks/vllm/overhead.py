"""What Steer itself does in a step, in seconds, without the model around it.

Where the machine's noise hides half a percent of a step, this does not: the worker's adapter runs
for a model that consists of taps alone.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.vllm.diets import Batch
from benchmarks.vllm.pair import PROMPT
from benchmarks.vllm.shapes import SLOTS, Shape
from steer.engines.vllm.taps.shifts import ShiftTables
from steer.engines.vllm.taps.taps import CompiledTap, EagerTap, OpaqueTap
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.edits import Edits, TapEdits
from steer.engines.vllm.worker.runner_v1 import RunnerV1
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

MAX_LENGTH = 2048
_INLINE_SPECS = 16
"""As many specs on every layer fit into the constants of a compiled graph by default."""

Plans = Sequence[SteeringPlan | None]


@dataclass(frozen=True)
class StepCost:
    """Medians in seconds: before the forward pass, at all its taps, after it."""

    begin: float
    taps: float
    end: float

    @property
    def total(self) -> float:
        return self.begin + self.taps + self.end


class _TapsAlone:
    """A model runner of vLLM's, as far as `RunnerV1` looks, whose model is its taps."""

    speculative_config = None
    use_async_spec_decode = False
    vllm_config = SimpleNamespace(
        parallel_config=SimpleNamespace(use_ubatching=False, prefill_context_parallel_size=1),
        cache_config=SimpleNamespace(kv_sharing_fast_prefill=False),
    )

    def __init__(
        self,
        shape: Shape,
        batch: int,
        taps: Sequence[Callable[[Tensor, Tensor], Any]],
        between: Callable[[], None] | None,
    ) -> None:
        self._taps, self._between = taps, between
        self.input_batch = SimpleNamespace(
            req_ids=[f"r{n}" for n in range(batch)],
            num_computed_tokens_cpu=np.zeros(batch, dtype=np.int32),
            token_ids_cpu=np.zeros((batch, MAX_LENGTH), dtype=np.int32),
        )
        generator = torch.Generator().manual_seed(2)
        self._base = torch.randn(2, batch * PROMPT, shape.d_model, generator=generator)
        self._states = self._base.clone()
        self.entered = self.left = 0.0

    def _determine_batch_execution_and_padding(
        self,
        force_eager: bool = False,  # a name that `RunnerV1` looks for
    ) -> None:
        """Where vLLM chooses a graph; there is none here."""

    def tokens(self, count: int) -> None:
        """Puts back the states of a pass over `count` tokens."""
        self._now = self._states[:, :count]
        self._now.copy_(self._base[:, :count])

    def _model_forward(
        self,
        input_ids: object = None,  # noqa: ARG002 (names that `RunnerV1` looks for)
        positions: object = None,  # noqa: ARG002
        intermediate_tensors: object = None,  # noqa: ARG002
        inputs_embeds: object = None,  # noqa: ARG002
    ) -> None:
        hidden, residual = self._now
        self.entered = time.perf_counter()
        for tap in self._taps:
            if self._between is not None:
                self._between()
            tap(hidden, residual)
        self.left = time.perf_counter()


def planned(plans: PlanCache, batch: Batch) -> list[SteeringPlan | None]:
    """The plan of each spec of a batch."""
    return [None if spec is None else plans.plan(parse_spec(spec)) for spec in batch]


class StepAlone:
    """Steer's work in a decode step of the requests of `plans`, which steer a model of `shape`.

    In a compiled engine the constants are part of the graph and not of this; `tap_costs` has them.
    `between` is called before every tap, where a model would compute its layer. `edits` and `taps`
    may be others than those that run in Python.
    """

    def __init__(
        self,
        shape: Shape,
        plans: Plans,
        *,
        compiled: bool,
        between: Callable[[], None] | None = None,
        edits: Edits | None = None,
        taps: Sequence[Callable[[Tensor, Tensor], Any]] | None = None,
    ) -> None:
        self._batch = batch = len(plans)
        known = {_hash(plan): plan for plan in plans if plan is not None}
        model = shape.info(MAX_LENGTH)
        self._steering = WorkerSteering(
            model,
            known.__getitem__,
            edits or TapEdits(model, SLOTS, torch.device("cpu")),
            max_requests=SLOTS,
            shifts=_shift_tables(shape) if compiled else None,
        )
        taps = _taps(shape, compiled=compiled) if taps is None else taps
        self._runner = _TapsAlone(shape, batch, taps, between)
        self._adapter = RunnerV1(self._runner, self._steering)
        self._arriving: Sequence[object] = [
            SimpleNamespace(
                req_id=f"r{n}",
                prompt_token_ids=[3] * PROMPT,
                prefill_token_ids=None,
                sampling_params=SimpleNamespace(extra_args=_extra_args(n, plan)),
            )
            for n, plan in enumerate(plans)
        ]

    def begin(self) -> None:
        """The step that computes all prompts."""
        self.prepare(PROMPT)
        self.step()

    def prepare(self, count: int = 1) -> None:
        """Makes the next step ready, of `count` tokens for each request: vLLM's part."""
        self._output = SimpleNamespace(
            finished_req_ids=(),
            scheduled_new_reqs=self._arriving,
            scheduled_cached_reqs=SimpleNamespace(resumed_req_ids=()),
            scheduled_spec_decode_tokens={},
            num_scheduled_tokens={f"r{n}": count for n in range(self._batch)},
        )
        self._arriving, self._count = (), count
        self._runner.tokens(self._batch * count)

    def step(self) -> tuple[float, float, float]:
        """Seconds before the forward pass, at all its taps, and after it."""
        runner = self._runner
        started = time.perf_counter()
        with self._adapter.step(self._output):
            runner._model_forward()
        ended = time.perf_counter()
        runner.input_batch.num_computed_tokens_cpu[:] += self._count
        return runner.entered - started, runner.left - runner.entered, ended - runner.left

    def check(self) -> None:
        """Raises `RuntimeError` where a plan was not carried out."""
        for req_id in self._runner.input_batch.req_ids:
            request = self._steering.requests.get(req_id)
            if request is not None and request.fault is not None:
                raise RuntimeError(f"a plan was not carried out: {request.fault}")


@torch.inference_mode()
def step_cost(alone: StepAlone, steps: int = 400) -> StepCost:
    """What a decode step costs, after a tenth of the steps that does not count."""
    alone.begin()
    found = []
    for number in range(steps + steps // 10):
        alone.prepare()
        taken = alone.step()
        if number >= steps // 10:
            found.append(taken)
    alone.check()
    return StepCost(*(statistics.median(part) for part in zip(*found, strict=True)))


@dataclass(frozen=True)
class TapCost:
    """Seconds of one tap at which nothing runs."""

    eager: float
    compiled: float


def tap_costs(
    shape: Shape, batches: Sequence[int], *, rounds: int = 25, repeats: int = 40
) -> list[TapCost]:
    """Of passes over as many tokens. A compiled tap is what a chain of norms and taps costs more
    than the same chain of norms, both compiled; the median over interleaved rounds."""
    count = 2 * shape.layers + 1
    tables = _shift_tables(shape)
    eager = [EagerTap(tap) for tap in range(count)]
    chains = [
        torch.compile(_Chain(taps, shape.d_model), dynamic=True)
        for taps in (
            [_NoTap() for _ in range(count)],
            [CompiledTap(tap, tables, OpaqueTap(tap, static=False)) for tap in range(count)],
        )
    ]

    def seconds(work: Callable[[], object]) -> float:
        started = time.perf_counter()
        for _ in range(repeats):
            work()
        return (time.perf_counter() - started) / repeats

    def of(tokens: int) -> TapCost:
        generator = torch.Generator().manual_seed(3)
        states = torch.randn(2, tokens, shape.d_model, generator=generator)
        looked, extra = [], []
        for number in range(rounds + 1):
            plain, tapped = (seconds(partial(chain, *states)) for chain in chains)
            if number:  # the first round compiles
                extra.append((tapped - plain) / count)
                looked.append(seconds(partial(_visit_all, eager, *states)) / count)
        return TapCost(statistics.median(looked), statistics.median(extra))

    with torch.inference_mode():
        return [of(tokens) for tokens in batches]


class _NoTap(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        return hidden, residual


class _Chain(nn.Module):
    """Fused adds and norms, as between the parts of a decoder layer, with a tap before each."""

    def __init__(self, taps: Sequence[nn.Module], width: int) -> None:
        super().__init__()
        self.taps = nn.ModuleList(taps)
        self.weight = nn.Parameter(torch.ones(width), requires_grad=False)

    def forward(self, hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        hidden, residual = hidden.clone(), residual.clone()
        for tap in self.taps:
            hidden, residual = tap(hidden, residual)
            residual = hidden + residual
            hidden = residual * torch.rsqrt(residual.pow(2).mean(-1, keepdim=True) + 1e-6)
            hidden = hidden * self.weight
        return hidden, residual


def _shift_tables(shape: Shape) -> ShiftTables:
    return ShiftTables(
        2 * shape.layers + 1,
        shape.d_model,
        variants=2 * SLOTS + 1,
        bank_rows=1 + _INLINE_SPECS * shape.layers,
        batch_tokens=SLOTS * PROMPT,
        device=torch.device("cpu"),
    )


def _visit_all(taps: Sequence[nn.Module], hidden: Tensor, residual: Tensor) -> None:
    for tap in taps:
        tap(hidden, residual)


def _taps(shape: Shape, *, compiled: bool) -> list[Callable[[Tensor, Tensor], Any]]:
    numbers, visit = range(2 * shape.layers + 1), torch.ops.steer.visit_pair
    if compiled:
        return [partial(_at, visit, tap) for tap in numbers]
    return [EagerTap(tap) for tap in numbers]


def _at(visit: Any, tap: int, hidden: Tensor, residual: Tensor) -> None:
    visit(hidden, residual, tap)


def _hash(plan: SteeringPlan) -> str:
    """A name for the plan in 64 hex digits, as a plan store's: nothing is stored here."""
    return plan.fingerprint * 2


def _extra_args(number: int, plan: SteeringPlan | None) -> dict[str, str] | None:
    if plan is None:
        return None
    return Ticket(
        str(number),
        fingerprint=plan.fingerprint,
        plan=_hash(plan),
        selections=tuple(one.selection for one in plan.rules),
    ).as_extra_args()
