"""vLLM's model runner V1: what the next forward pass computes, and when it is over.

The runner orders the batch anew in `_update_states`, after `execute_model` has been called and
before the forward pass; `_model_forward` is made for subclasses to override and is called in
between, so the batch is read there. Dummy passes call the model directly and are not steered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.batch.requests import Ints
from steer.engines.vllm.internals import DISPATCH_V1, RUNNER_V1, STAGES
from steer.engines.vllm.pipeline import handing_on
from steer.engines.vllm.seams import check, forced
from steer.engines.vllm.worker.prepared import BatchTokens, refuse_split_batches
from steer.engines.vllm.worker.states import (
    empty_states,
    filled_null_block,
    own_blocks,
    reads_attention,
)
from steer.engines.vllm.worker.steering import WorkerSteering, take_note
from steer.errors import Unsupported

_AHEAD = "use_async_spec_decode"
"""Whether the host takes drafted tokens for accepted before it knows, and the device alone knows
where requests stand and which tokens they read."""


class RunnerV1:
    """Assumes: the worker deals with each scheduler output inside `step`."""

    def __init__(self, runner: Any, steering: WorkerSteering) -> None:
        _check(runner)
        self._runner, self._steering = runner, steering
        self._scheduled: dict[str, int] | None = None
        self._drafted: dict[str, list[int]] = {}
        self._forward: Callable[..., Any] = runner._model_forward
        runner._model_forward = self._model_forward

    @contextmanager
    def step(self, output: Any) -> Iterator[None]:
        """The time in which the worker deals with the scheduler output `output`."""
        take_note(self._steering, output)
        self._scheduled = output.num_scheduled_tokens or None
        self._drafted = output.scheduled_spec_decode_tokens
        try:
            graphless = self._steering.graphless(output.num_scheduled_tokens)
            with handing_on(self._runner, self._steering), self._graphs(off=graphless):
                yield
        finally:
            self._scheduled = None

    def dummy_pass(self, tokens: int, *, graphless: bool = False) -> Tensor:
        """What the model makes of `tokens` dummy requests of one token: `[>= tokens, ...]`."""
        runner = self._runner
        with ExitStack() as stack:
            stack.enter_context(empty_states(runner, tokens))
            stack.enter_context(own_blocks(runner, tokens))
            stack.enter_context(self._graphs(off=graphless))
            if reads_attention(self._steering.model):
                stack.enter_context(filled_null_block(runner))
            return _joined(runner._dummy_run(tokens, force_attention=True)[0])

    @staticmethod
    def trial_pass(runner: Any, tokens: int) -> Tensor:
        """What the model of `runner`, just loaded, makes of `tokens` tokens without a cache."""
        return _joined(runner._dummy_run(tokens, is_profile=True, skip_eplb=True)[0])

    def _model_forward(self, *args: Any, **named: Any) -> Any:
        if self._scheduled is None:
            return self._forward(*args, **named)
        if not self._steering.busy:
            self._steering.rest()
            return self._forward(*args, **named)
        self._steering.begin(self._batch(self._scheduled))
        try:
            output = self._forward(*args, **named)
        except BaseException:
            self._steering.abandon()
            raise
        self._steering.end()
        return output

    def _graphs(self, *, off: bool) -> AbstractContextManager[None]:
        """Inside the block, passes run without CUDA graphs where these are `off`."""
        return forced(self._runner, DISPATCH_V1, force_eager=True) if off else nullcontext()

    def _batch(self, scheduled: dict[str, int]) -> BatchTokens:
        batch = self._runner.input_batch
        req_ids, ahead = batch.req_ids, bool(getattr(self._runner, _AHEAD))
        starts = batch.num_computed_tokens_cpu[: len(req_ids)].astype(np.int64)
        counts = np.array([scheduled[req_id] for req_id in req_ids], dtype=np.int64)
        ends = np.cumsum(counts)
        if ahead:  # this waits for the device
            starts = self._runner.positions[torch.from_numpy(ends - counts)].cpu().numpy()

        def read() -> Ints:
            rows = np.repeat(np.arange(len(req_ids)), counts)
            tokens = batch.token_ids_cpu[
                rows, np.arange(len(rows)) + (starts - ends + counts)[rows]
            ]
            if ahead or (tokens < 0).any():
                # With asynchronous scheduling the host holds −1 for a token that was sampled in
                # the step before; the input that the model is about to read has it.
                tokens = self._runner.input_ids.gpu[: len(rows)].cpu().numpy()
            return np.array(tokens, dtype=np.int64)

        return BatchTokens(req_ids, starts, counts, read, _drafts(req_ids, self._drafted))


def _drafts(req_ids: Sequence[str], drafted: Mapping[str, Sequence[int]]) -> Ints | None:
    """How many tokens of each request are drafted; None where none is."""
    if not drafted:
        return None
    return np.array([len(drafted.get(req_id, ())) for req_id in req_ids], dtype=np.int64)


def _joined(made: Any) -> Tensor:
    """Hidden states, or all that one stage of a pipeline hands to the next, `[T, ...]`."""
    halves = [made] if isinstance(made, Tensor) else list(made.tensors.values())
    return torch.cat(halves, dim=-1)


def _check(runner: Any) -> None:
    """Refuses a runner that is not built as this adapter expects, or that splits its batches."""
    check(*RUNNER_V1, *STAGES)
    refuse_split_batches(runner.vllm_config)
    if runner.speculative_config is not None and runner.speculative_config.use_ngram_gpu():
        raise Unsupported(
            "the speculative method 'ngram_gpu' changes the schedule of a step within it on vLLM's "
            "model runner V1, which is not supported beside steering: use 'ngram', or runner V2",
            code="speculative_decoding",
        )
