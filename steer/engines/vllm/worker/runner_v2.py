"""vLLM's model runner V2: what the next forward pass computes, and when it is over.

The runner asks its model state for the model's inputs once in every step, after the batch is put
together and before the forward pass, be that eager, compiled or the replay of a graph. Dummy runs
ask as well, with requests that nobody sent in the slots of real ones; so requests are known by
their ids alone, and only inside a step of the scheduler's.

A preempted request leaves the runner and comes back as a new one in another slot; `remove_request`
of the model state is therefore not a request's end.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.batch.requests import Ints
from steer.engines.vllm.internals import DISPATCH_V2, RUNNER_V2, STAGES
from steer.engines.vllm.pipeline import handing_on
from steer.engines.vllm.seams import check, forced, version
from steer.engines.vllm.worker.prepared import BatchTokens, refuse_split_batches
from steer.engines.vllm.worker.states import (
    NULL_CONTEXT,
    empty_states,
    filled_null_block,
    reads_attention,
    state_groups,
)
from steer.engines.vllm.worker.steering import WorkerSteering, take_note
from steer.errors import Unsupported

_PREPARE_INPUTS = ("input_batch", "req_states")


class RunnerV2:
    """Assumes: the worker deals with each scheduler output inside `step`; `runner` has loaded its
    model. Guarantees: dummy runs are not steered and change nothing."""

    def __init__(self, runner: Any, steering: WorkerSteering) -> None:
        _check(runner)
        self._runner, self._steering = runner, steering
        self._computing = False
        config = runner.vllm_config
        # The host then takes drafted tokens for accepted before it knows.
        self._ahead = bool(
            config.speculative_config is not None and config.scheduler_config.async_scheduling
        )
        state = runner.model_state
        self._model_inputs = state.prepare_inputs
        state.prepare_inputs = self._prepare_inputs

    @contextmanager
    def step(self, output: Any) -> Iterator[None]:
        """The time in which the worker deals with the scheduler output `output`."""
        take_note(self._steering, output)
        self._computing = bool(output.num_scheduled_tokens)
        try:
            graphless = self._steering.graphless(output.num_scheduled_tokens)
            with handing_on(self._runner, self._steering), _graphs(off=graphless):
                yield
        except BaseException:
            self._steering.abandon()
            raise
        else:
            # The forward pass has been launched: no tap is reached any more.
            self._steering.end()
        finally:
            self._computing = False

    def dummy_pass(self, tokens: int, *, graphless: bool = False) -> Tensor:
        """What the model makes of `tokens` dummy requests of one token: `[>= tokens, ...]`."""
        runner = self._runner
        options: dict[str, Any] = {"valid_dummy_state_slots": bool(state_groups(runner))}
        with ExitStack() as stack:
            stack.enter_context(empty_states(runner, tokens))
            stack.enter_context(_graphs(off=graphless))
            if reads_attention(self._steering.model):
                stack.enter_context(filled_null_block(runner))
                options["context_len"] = NULL_CONTEXT
            return _dummy_pass(runner, tokens, **options)

    @staticmethod
    def trial_pass(runner: Any, tokens: int) -> Tensor:
        """What the model of `runner`, just loaded, makes of `tokens` tokens without a cache."""
        return _dummy_pass(runner, tokens, is_profile=True, skip_attn=True, skip_eplb=True)

    def _prepare_inputs(self, input_batch: Any, req_states: Any) -> Any:
        if self._computing:
            if self._steering.busy:
                self._steering.begin(_batch(input_batch, ahead=self._ahead))
            else:
                self._steering.rest()
        return self._model_inputs(input_batch, req_states)


def _graphs(*, off: bool) -> AbstractContextManager[None]:
    """Inside the block, passes run without CUDA graphs where these are `off`."""
    from vllm.v1.worker.gpu import model_runner  # noqa: PLC0415

    return forced(model_runner, DISPATCH_V2, need_eager=True) if off else nullcontext()


def _dummy_pass(runner: Any, tokens: int, **options: Any) -> Tensor:
    """What the model makes of dummy requests, or what its stage of a pipeline hands on."""
    made: list[Any] = []
    execute = runner.execute_model

    def execute_and_keep(*args: Any, **named: Any) -> Any:
        made.append(execute(*args, **named))
        return made[-1]

    # A stage of a pipeline hands on what it made, and `_dummy_run` drops it.
    runner.execute_model = execute_and_keep
    try:
        hidden = runner._dummy_run(tokens, **options)[0]
    finally:
        del runner.execute_model
    if hidden is None:
        return torch.cat(list(made[-1].tensors.values()), dim=-1)
    return torch.as_tensor(hidden)


def _batch(batch: Any, *, ahead: bool = False) -> BatchTokens:
    """The tokens of a step, from vLLM's `InputBatch`; where the host is `ahead` of what it knows,
    the device says where requests stand."""
    starts, drafts = batch.num_computed_tokens_np, batch.num_draft_tokens_per_req
    if ahead:  # this waits for the device
        first = torch.from_numpy(batch.query_start_loc_np[: len(starts)].astype(np.int64))
        starts = batch.positions[first].cpu().numpy()

    def read() -> Ints:
        # Tokens that the last step sampled are known on the device alone: on a GPU this waits.
        found: Ints = batch.input_ids[: batch.num_tokens].cpu().numpy().astype(np.int64)
        return found

    return BatchTokens(
        batch.req_ids,
        starts.astype(np.int64),
        batch.num_scheduled_tokens.astype(np.int64),
        read,
        None if drafts is None else drafts.astype(np.int64),
    )


def _check(runner: Any) -> None:
    """Refuses a runner that is not built as this adapter expects, or that splits its batches."""
    check(*RUNNER_V2, *STAGES)
    refuse_split_batches(runner.vllm_config)
    parameters = tuple(inspect.signature(runner.model_state.prepare_inputs).parameters)
    if parameters != _PREPARE_INPUTS:
        raise Unsupported(
            f"in vLLM {version()}, {type(runner.model_state).__qualname__}.prepare_inputs takes "
            f"{parameters} and not {_PREPARE_INPUTS}: install a version of vLLM that this version "
            "of Steer names as supported",
            code="unknown_vllm",
        )
    config = runner.vllm_config
    if getattr(config.speculative_config, "enable_adaptive_verification", False):
        raise Unsupported(
            "with enable_adaptive_verification the device alone knows which drafted tokens a step "
            "computes, which is not supported beside steering: leave it out of speculative_config",
            code="speculative_decoding",
        )
    if runner.model_state.num_new_sampled_tokens_per_step != 1:
        raise Unsupported(
            "a model that samples several tokens in a step is not supported beside steering",
            code="several_tokens_per_step",
        )
