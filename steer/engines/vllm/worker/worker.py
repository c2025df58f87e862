"""vLLM's worker with steering: the same worker, its model tapped, its schedule overheard."""

from __future__ import annotations

import dataclasses
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.vllm.seams import version
from steer.engines.vllm.taps.streams import uncompiled
from steer.engines.vllm.taps.taps import DecoderStack
from steer.engines.vllm.worker.answers import (
    capture_answer,
    carry_answer,
    divergence_answer,
    info_answer,
    logprobs_answer,
    project_answer,
    queries_answer,
    readout_answer,
    receipt_answer,
    rows_of_nobody,
    token_rows_answer,
    unembed_answer,
    without_adapters,
)
from steer.engines.vllm.worker.build import attach, block_states, read_model
from steer.engines.vllm.worker.proof import prove
from steer.engines.vllm.worker.runner_v1 import RunnerV1
from steer.engines.vllm.worker.runner_v2 import RunnerV2
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.spec import Site

RUNNERS: dict[str, type[RunnerV1] | type[RunnerV2]] = {
    "vllm.v1.worker.gpu_model_runner.GPUModelRunner": RunnerV1,
    "vllm.v1.worker.gpu.model_runner.GPUModelRunner": RunnerV2,
}
"""vLLM's model runners, on CPUs as on GPUs, and what steers them."""


def adapter(runner: Any) -> type[RunnerV1] | type[RunnerV2]:
    """What steers a model runner of this class. Raises `Unsupported` for one that is not known."""
    lineage = [f"{one.__module__}.{one.__qualname__}" for one in type(runner).__mro__]
    for name in lineage:
        if name in RUNNERS:
            return RUNNERS[name]
    raise Unsupported(
        f"the model runner {lineage[0]} of vLLM {version()} cannot be steered: use one of "
        f"{', '.join(RUNNERS)}",
        code="unsupported_runner",
    )


def look_at_logits(model: Any, steering: WorkerSteering) -> None:
    """Shows `steering` the first logits after each pass, and what they are made of: a row for each
    request of the batch, on the workers that compute them."""
    compute = model.compute_logits

    def compute_logits(hidden_states: Tensor, *args: Any, **named: Any) -> Any:
        logits = compute(hidden_states, *args, **named)
        if logits is not None:
            steering.look(hidden_states, logits)
        return logits

    model.compute_logits = compute_logits


def check_apart(stack: DecoderStack, drafter: nn.Module | None) -> None:
    """Raises `Unsupported` where a model that drafts tokens runs through taps of `stack`: drafts
    are not steered, and edits there would be those of another pass. Assumes: the taps are in place.

    Other modules may be shared: vLLM has one rotary embedding for all layers that ask for the same.
    """
    modules = [module for _, layer in stack.layers for module in layer.modules()]
    tapped = {module for module in modules if "forward" in vars(module)}  # as `install` leaves it
    shared = [] if drafter is None else [one for one in drafter.modules() if one in tapped]
    if shared:
        raise Unsupported(
            f"{type(drafter).__name__} drafts tokens with a {type(shared[0]).__name__} of the "
            "layers that are steered: start vLLM with another speculative_config",
            code="speculative_decoding",
        )


class SteerWorker:
    """A mixin in front of one of vLLM's worker classes.

    Guarantees: a worker that does not steer, or that would change unsteered tokens, raises at
    start-up and so never serves.
    """

    steering: WorkerSteering

    def load_model(self, *args: Any, **named: Any) -> None:
        """Loads the model, then taps it, before anything is profiled or compiled."""
        super().load_model(*args, **named)  # type: ignore[misc]
        worker: Any = self
        runner = worker.model_runner
        steered, drafter = adapter(runner), runner.get_draft_model()
        # What drafts runs in trial passes as well, and would be compiled for them.
        with nullcontext() if drafter is None else uncompiled(drafter):
            read = read_model(
                runner.get_model(),
                partial(steered.trial_pass, runner),
                worker.vllm_config,
                worker.device,
                largest=runner.max_num_tokens,
                without_adapters=rows_of_nobody(runner),
            )
        self._unembed = read.unembed and without_adapters(runner, read.unembed)
        self._rows, self._projections = read.rows, read.projections
        self._alone = read.alone
        self.steering = attach(
            read,
            worker.vllm_config,
            worker.device,
            tapped=partial(check_apart, read.stack, drafter),
        )
        self._blocks = block_states(read, self.steering, worker.vllm_config)
        self._runner = steered(runner, self.steering)
        look_at_logits(runner.get_model(), self.steering)

    def compile_or_warm_up_model(self) -> Any:
        """Warms up, then proves that steering acts."""
        result = super().compile_or_warm_up_model()  # type: ignore[misc]
        worker: Any = self
        experts = bool(worker.model_config.is_moe)
        largest = worker.model_runner.max_num_tokens
        prove(self.steering, self._runner.dummy_pass, largest, experts=experts)
        return result

    @torch.inference_mode()
    def execute_model(self, scheduler_output: Any, *args: Any, **named: Any) -> Any:
        """One step, steered."""
        with self._runner.step(scheduler_output):
            return super().execute_model(scheduler_output, *args, **named)  # type: ignore[misc]

    # What front ends ask over `collective_rpc`; answers are plain values that msgpack carries.

    def steer_info(self) -> dict[str, Any]:
        """The model's shape and what this worker can do."""
        return info_answer(self.steering, self._projections, self._alone)

    def steer_receipts(self, asked: list[tuple[str, dict[int, int]]]) -> list[dict[int, Any]]:
        """For each `(key, {choice: tokens fed})` the receipts by choice; they are then dropped."""
        return [receipt_answer(self.steering.requests, key, fed) for key, fed in asked]

    def steer_readouts(self, asked: list[tuple[str, dict[int, int], bool]]) -> list[dict[int, Any]]:
        """For each `(key, {choice: tokens fed}, last)` what was read by choice, each token's once;
        after the last call nothing is left."""
        requests = self.steering.requests
        return [readout_answer(requests, key, fed, last=last) for key, fed, last in asked]

    def steer_divergences(
        self, asked: list[tuple[str, int, int, str]]
    ) -> list[dict[str, Any] | None]:
        """For each `(key, choice, tokens fed, the twin's key)` the divergence of each token that
        was chosen; None on a worker that knows none."""
        return [divergence_answer(self.steering, *one) for one in asked]

    def steer_captured(self, keys: list[str]) -> list[dict[str, bytes]]:
        """What was captured under each of `keys`: states by hook point, and what heads attend to;
        it is then dropped."""
        return [capture_answer(self.steering, key) for key in keys]

    def steer_project(self, layer: int, site: Site, states: bytes) -> dict[str, Any] | None:
        """What the output projection behind a hook point makes of float32 states `[rows, width]`;
        None on a worker without the layer. All tensor-parallel ranks must be asked."""
        return project_answer(self._projections, layer, site, states, self.steering.model)

    def steer_queries(self, layer: int, states: bytes) -> dict[str, Any] | None:
        """What the attention of `layer` is handed of float32 states `[rows, d_model]` before the
        layer; None on a worker without it. All tensor-parallel ranks must be asked."""
        return queries_answer(self.steering, self._alone, layer, states)

    def steer_carried(
        self,
        layer: int,
        sites: tuple[Site, Site],
        states: bytes,
        channels: tuple[int, int] | None = None,
    ) -> dict[str, Any] | None:
        """What the block `layer` makes at the second of `sites` of float32 states `[rows, width]`
        at the first, of `channels` from one number up to another; None on a worker without the
        layer. All tensor-parallel ranks must be asked."""
        source, target = (HookPoint(layer, site) for site in sites)
        chosen = slice(*(channels or (None,)))
        return carry_answer(self._blocks, source, target, states, chosen)

    def steer_unembed(self, states: bytes) -> bytes | None:
        """Float32 states `[rows, d_model]` after the last layer to logits `[rows, vocab]`; None on
        a worker without the last layer. All tensor-parallel ranks must be asked."""
        return unembed_answer(self._unembed, states, self.steering.model)

    def steer_token_rows(self, tokens: list[int]) -> dict[str, Any]:
        """The rows of the output matrix that this worker has of `tokens`, the final norm folded in,
        by token. All tensor-parallel ranks must be asked."""
        return token_rows_answer(self._rows, self._unembed, tokens, self.steering.model)

    def steer_logprobs(self, states: bytes, tokens: list[int], count: int) -> dict[str, Any] | None:
        """As `steer_unembed`, but of each row only what it says of the token in its place, and the
        best `count`."""
        return logprobs_answer(self._unembed, states, tokens, count, self.steering.model)

    def steer_stats(self) -> dict[str, Any]:
        """WorkerRequest figures for metrics."""
        return dataclasses.asdict(self.steering.stats())
