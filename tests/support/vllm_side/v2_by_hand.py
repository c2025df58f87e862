"""vLLM's model runner V2 without a model: its own records of a batch, moved as the runner moves
them, and a stream of which one sees what steering did to it.

Import `vllm_engine` and enable `v2_on_cpu` before this module.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

# vLLM's CPU worker imports this first as well.
import vllm.v1.worker.cpu.shm  # noqa: F401  # isort: skip
from torch import Tensor
from vllm import SamplingParams
from vllm.v1.core.sched.output import NewRequestData, SchedulerOutput
from vllm.v1.worker.gpu.input_batch import InputBatch, InputBuffers
from vllm.v1.worker.gpu.states import RequestState

from steer.engines.vllm.taps import ops
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.edits import TapEdits
from steer.engines.vllm.worker.requests import receipt
from steer.engines.vllm.worker.runner_v2 import RunnerV2
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.model import ModelInfo
from steer.plan.plan import SteeringPlan

TOKENS = 64
DRAFTS = 3
CPU = torch.device("cpu")


@dataclass
class Known:
    """A request, all its tokens, and how many are computed."""

    name: str
    tokens: list[int]
    prompt_length: int
    plan: SteeringPlan | None
    ticket: Ticket | None
    computed: int = 0

    def steered(self, count: int) -> list[bool]:
        """For each of the next `count` tokens, whether a pass of the plan selects it."""
        positions = np.arange(self.computed, self.computed + count)
        tokens = np.array(self.tokens)[positions]
        found = np.zeros(count, dtype=bool)
        for one in () if self.plan is None else self.plan.rules:
            found |= one.selection.mask(positions, self.prompt_length, tokens)
        return found.tolist()


@dataclass(frozen=True)
class Drafted:
    """How many of the tokens that a pass computes of a request are drafted; those at the end that
    do not stay are `wrong`."""

    count: int
    wrong: tuple[int, ...] = ()


class State:
    """A model state as this vLLM's, as far as the adapter meets it."""

    num_new_sampled_tokens_per_step = 1

    def __init__(self) -> None:
        self.asked: list[InputBatch] = []

    def prepare_inputs(self, input_batch: InputBatch, req_states: RequestState) -> dict[str, Any]:
        self.asked.append(input_batch)
        return {"made": req_states}


class OnDevice:
    """Token ids that count how often they are copied to the host."""

    def __init__(self, ids: Tensor) -> None:
        self.ids, self.copies = ids, 0

    def __getitem__(self, place: slice) -> OnDevice:
        self.place = place
        return self

    def cpu(self) -> Tensor:
        self.copies += 1
        return self.ids[self.place]


def config(**fields: Any) -> SimpleNamespace:
    """What the adapter reads of a `VllmConfig`."""
    parallel = {"use_ubatching": False, "prefill_context_parallel_size": 1}
    cache = {"kv_sharing_fast_prefill": False}
    given = {"speculative_config": None, **fields}
    return SimpleNamespace(
        speculative_config=given["speculative_config"],
        scheduler_config=SimpleNamespace(async_scheduling=given.get("async_scheduling", False)),
        parallel_config=SimpleNamespace(**{k: given.get(k, v) for k, v in parallel.items()}),
        cache_config=SimpleNamespace(**{k: given.get(k, v) for k, v in cache.items()}),
        compilation_config=SimpleNamespace(static_forward_context={}),
    )


@dataclass
class ByHand:
    """Steps of the runner; `model_state` and `vllm_config` are its attributes."""

    info: ModelInfo
    slots: int = 4
    vllm_config: SimpleNamespace = field(default_factory=config)

    def __post_init__(self) -> None:
        self.model_state = State()
        self.known: dict[str, Known] = {}
        self.plans: dict[str, SteeringPlan] = {}
        self.states = RequestState(
            self.slots, self.info.max_length, TOKENS, 0, self.info.vocab_size, CPU
        )
        self.buffers = InputBuffers(self.slots, TOKENS, CPU)
        self.ids = OnDevice(self.buffers.input_ids)
        self.steering = WorkerSteering(
            self.info,
            self.plans.__getitem__,
            TapEdits(self.info, self.slots, CPU),
            max_requests=self.slots,
            drafts=DRAFTS,
        )
        self.adapter = RunnerV2(self, self.steering)

    def request(
        self, name: str, tokens: Sequence[int], prompt_length: int, plan: SteeringPlan | None
    ) -> Known:
        """Makes a request that `step` can schedule."""
        ticket = None
        if plan is not None:
            sha256 = hashlib.sha256(plan.fingerprint.encode()).hexdigest()
            self.plans[sha256] = plan
            chosen = tuple(one.selection for one in plan.rules)
            ticket = Ticket(
                f"key of {name}",
                fingerprint=plan.fingerprint,
                plan=sha256,
                selections=chosen,
                latents=plan.latents,
                graphless=plan.graphless,
                onward=plan.onward,
            )
        self.known[name] = Known(name, list(tokens), prompt_length, plan, ticket)
        return self.known[name]

    def slot(self, name: str) -> int:
        return self.states.req_id_to_index[name]

    def step(
        self,
        scheduled: Mapping[str, int],
        *,
        new: Iterable[str] = (),
        finished: Iterable[str] = (),
        preempted: Iterable[str] = (),
        drafted: Mapping[str, Drafted] | None = None,
        stream: Tensor | None = None,
        forward: Callable[[Tensor], list[bool]] | None = None,
    ) -> list[bool]:
        """One step; the tokens of `scheduled` lie in its order. Which of them were changed.

        `drafted` are the last tokens of some requests. `stream` `[d]` is what every token has for
        its state at every tap.
        """
        drafted = drafted or {}
        output = SchedulerOutput.make_empty()
        output.num_scheduled_tokens = dict(sorted(scheduled.items()))
        output.total_num_scheduled_tokens = sum(scheduled.values())
        output.scheduled_new_reqs = [self._new(self.known[name]) for name in new]
        output.finished_req_ids, output.preempted_req_ids = set(finished), set(preempted)
        with self.adapter.step(output):
            for name in sorted({*finished, *preempted}):
                self.states.remove_request(name)
            for one in output.scheduled_new_reqs:
                self.states.remove_request(one.req_id)
                self.states.add_request(
                    one.req_id, one.prompt_len, one.prefill_token_ids, one.num_computed_tokens, 9
                )
            if not scheduled:
                return []
            inputs = self.model_state.prepare_inputs(self.batch(scheduled, drafted), self.states)
            assert inputs == {"made": self.states}
            x = torch.ones(self.info.d_model) if stream is None else stream
            changed = (forward or self.forward)(x.expand(TOKENS, -1))
        for name, count in scheduled.items():
            one, wrong = self.known[name], len(drafted[name].wrong) if name in drafted else 0
            one.computed += count - wrong
            told = one.computed + (wrong if self.adapter._ahead else 0)
            self.states.num_computed_tokens_np[self.slot(name)] = told
        return changed[: sum(scheduled.values())]

    def forward(self, stream: Tensor) -> list[bool]:
        """Shows `stream` `[TOKENS, d]` at every tap; which rows came back changed."""
        changed = torch.zeros(TOKENS, dtype=torch.bool)
        for tap in range(2 * self.info.n_layers + 1):
            hidden, residual = torch.zeros_like(stream), stream.clone()
            ops.visit(tap, hidden, residual)
            changed |= (hidden != 0).any(dim=-1) | (residual != stream).any(dim=-1)
        return changed.tolist()

    def dummy_run(self, requests: int) -> list[bool]:
        """A dummy run, whose made-up requests lie in the slots of real ones."""
        batch = InputBatch.make_dummy(requests, requests, self.buffers)
        assert batch.idx_mapping_np.tolist() == list(range(requests))
        self.model_state.prepare_inputs(batch, self.states)
        return self.forward(torch.ones(TOKENS, self.info.d_model))

    def batch(self, scheduled: Mapping[str, int], drafted: Mapping[str, Drafted]) -> InputBatch:
        """The batch that vLLM makes of these requests, padded by three tokens."""
        names, counts = list(scheduled), np.array(list(scheduled.values()), dtype=np.int32)
        total = int(counts.sum())
        dummy = InputBatch.make_dummy(len(names), total, self.buffers)
        slots = np.array([self.slot(name) for name in names], dtype=np.intp)
        bounds = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
        for name, start, count in zip(names, bounds, counts, strict=False):
            one = self.known[name]
            wrong = drafted[name].wrong if name in drafted else ()
            tokens = one.tokens[one.computed : one.computed + count - len(wrong)]
            self.buffers.input_ids[start : start + count] = torch.tensor([*tokens, *wrong])
            positions = torch.arange(one.computed, one.computed + count)
            self.buffers.positions[start : start + count] = positions
        drafts = [drafted[name].count if name in drafted else 0 for name in names]
        return replace(
            dummy,
            req_ids=names,
            idx_mapping_np=slots,
            num_scheduled_tokens=counts,
            num_tokens_after_padding=total + 3,
            query_start_loc_np=bounds,
            num_computed_tokens_np=self.states.num_computed_tokens_np[slots],
            num_draft_tokens_per_req=np.array(drafts, dtype=np.int32) if any(drafts) else None,
            positions=self.buffers.positions[: total + 3],
            input_ids=self.ids,
        )

    def steered_tokens(self, name: str, fed: int) -> int:
        """What the receipt of a request says about its first `fed` tokens."""
        key = self.known[name].ticket.key
        return receipt(self.steering.requests.records(key)[0], fed).tokens_steered

    def _new(self, one: Known) -> NewRequestData:
        extra = None if one.ticket is None else one.ticket.as_extra_args()
        return NewRequestData(
            req_id=one.name,
            prompt_token_ids=one.tokens[: one.prompt_length],
            mm_features=[],
            sampling_params=SamplingParams(extra_args=extra),
            pooling_params=None,
            block_ids=([],),
            num_computed_tokens=one.computed,
            lora_request=None,
            prefill_token_ids=one.tokens[: max(one.prompt_length, one.computed)],
        )
