"""Puts steering into a worker whose model is loaded: what its layers are, tables, taps, and how
plans are found."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import nn

from steer.engines.vllm.options import SteerOptions, is_static, registry_location
from steer.engines.vllm.pipeline import own_part
from steer.engines.vllm.static.form import StaticForm, set_form
from steer.engines.vllm.taps.decoder import find_decoder, unsupported
from steer.engines.vllm.taps.layouts import Unembed, choose_stack, find_unembedding
from steer.engines.vllm.taps.shifts import ShiftTables
from steer.engines.vllm.taps.streams import TrialPass, read_streams
from steer.engines.vllm.taps.taps import CompiledTap, DecoderStack, EagerTap, OpaqueTap, install
from steer.engines.vllm.worker.edits import Edits, StaticEdits, TapEdits
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.model import ModelInfo
from steer.plan.file import load_plan
from steer.plan.plan import SteeringPlan
from steer.registry.blobs.plan_store import PlanStore
from steer.spec import Site

_KEPT_PLANS = 2048
_SHIFT_SPECS = 256


def read_model(
    model: nn.Module, run: TrialPass, config: Any, *, largest: int
) -> tuple[DecoderStack, Unembed | None]:
    """The layers of `model` as they can be tapped, and the way from their last state to logits.

    `run` makes trial passes, of `largest` tokens at most; `config` is vLLM's of the model. Raises
    `Unsupported` for a model that cannot be steered.
    """
    if config.is_encoder_decoder:
        raise unsupported(model, "it is an encoder with a decoder")
    decoder = find_decoder(model, config.get_total_num_hidden_layers())
    streams = read_streams(
        decoder,
        run,
        width=config.get_hidden_size(),
        largest=largest,
        experts=bool(config.is_moe),
    )
    return choose_stack(decoder, streams), find_unembedding(decoder, streams)


def attach(stack: DecoderStack, vllm_config: Any, device: torch.device) -> WorkerSteering:
    """Taps the layers of `stack` and gives the worker's steering."""
    options = SteerOptions.stamped(vllm_config.additional_config)
    static = is_static(vllm_config, options)
    info = model_info(vllm_config, stack.layout.sites)
    scheduler = vllm_config.scheduler_config
    requests, tokens = scheduler.max_num_seqs, scheduler.max_num_batched_tokens
    tokens = max(tokens, *(vllm_config.compilation_config.cudagraph_capture_sizes or [0]))
    edits: Edits
    if static:
        form = StaticForm(
            info,
            stack.taps,
            max_requests=requests,
            batch_tokens=tokens,
            edit_rows=options.edit_rows,
            device=device,
        )
        set_form(form)
        edits = StaticEdits(form, TapEdits(info, requests, device))
    else:
        edits = TapEdits(info, requests, device)
    shifts = None
    if compiles(vllm_config):
        specs = min(requests, _SHIFT_SPECS)
        shifts = ShiftTables(
            2 * info.n_layers + 1,
            info.d_model,
            variants=2 * requests + 1,
            bank_rows=1 + (options.shift_rows or specs * info.n_layers),
            batch_tokens=tokens,
            device=device,
        )
    install(stack, lambda index: _tap(index, shifts, static=static))
    load = plan_loader(PlanStore(registry_location()), info)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    return WorkerSteering(
        info,
        load if stages == 1 else (lambda sha256: own_part(load(sha256), stack.owns)),
        edits,
        max_requests=requests,
        shifts=shifts,
        owns=stack.owns,
        stages=stages,
    )


def _tap(index: int, shifts: ShiftTables | None, *, static: bool) -> nn.Module:
    if shifts is not None:
        return CompiledTap(index, shifts, OpaqueTap(index, static=static))
    return OpaqueTap(index, static=True) if static else EagerTap(index)


def compiles(vllm_config: Any) -> bool:
    """Whether vLLM will run the model through torch.compile."""
    return str(vllm_config.compilation_config.mode.name) != "NONE"


def model_info(vllm_config: Any, sites: tuple[Site, ...]) -> ModelInfo:
    """The shape of the model that vLLM serves, whose layers have `sites`."""
    config = vllm_config.model_config
    return ModelInfo(
        name=str(config.served_model_name or config.model),
        architecture=config.architectures[0],
        n_layers=config.get_total_num_hidden_layers(),
        d_model=config.get_hidden_size(),
        vocab_size=config.get_vocab_size(),
        max_length=config.max_model_len,
        dtype=str(config.dtype).removeprefix("torch."),
        sites=sites,
    )


def plan_loader(store: PlanStore, model: ModelInfo) -> Callable[[str], SteeringPlan]:
    """Plans by their hash in `store`, the last ones kept in memory."""

    @lru_cache(_KEPT_PLANS)
    def load(sha256: str) -> SteeringPlan:
        return load_plan(store.get(sha256), store.sae_encoder, model=model)

    return load
