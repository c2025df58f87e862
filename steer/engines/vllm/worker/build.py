"""Puts steering into a worker whose model is loaded: what its layers are, tables, taps, and how
plans are found."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, NamedTuple

import torch
from torch import nn

from steer.batch.encoders import DeviceEncoders
from steer.engines.vllm.inside.alone import LayersAlone
from steer.engines.vllm.inside.carried import BlockStates
from steer.engines.vllm.inside.layers import AttentionLayers, AttentionSearch
from steer.engines.vllm.inside.projections import Projections, find_projections
from steer.engines.vllm.options import KEY, SteerOptions, is_static, registry_location
from steer.engines.vllm.pipeline import own_part
from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.static.operators import set_form
from steer.engines.vllm.taps.decoder import find_decoder, unsupported
from steer.engines.vllm.taps.inner_trial import Absent, open_inner_sites
from steer.engines.vllm.taps.layouts import Unembed, choose_stack, find_unembedding
from steer.engines.vllm.taps.shifts import ShiftTables
from steer.engines.vllm.taps.streams import TrialPass, read_streams
from steer.engines.vllm.taps.switch import TapSwitch
from steer.engines.vllm.taps.taps import CompiledTap, DecoderStack, EagerTap, OpaqueTap, install
from steer.engines.vllm.taps.token_rows import HeadRows, find_rows
from steer.engines.vllm.worker.edits import Edits, StaticEdits, TapEdits
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.engines.vllm.worker.tensor_parallel import (
    check_unsplit,
    load_together,
    own_rank,
    shards_of,
)
from steer.errors import Unsupported
from steer.model import ModelInfo
from steer.plan.file import load_plan
from steer.plan.plan import SteeringPlan
from steer.readouts.file import load_readouts
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readers import Instruments
from steer.registry.blobs.plan_store import PlanStore

_KEPT_PLANS, _KEPT_READOUTS = 2048, 64
_SHIFT_SPECS = 256


@dataclass(frozen=True)
class ReadModel:
    """The layers of a model as they can be tapped, why they lack other sites, the way from their
    last state to logits, the rows of its matrix, and what lies inside of attention and MLP."""

    stack: DecoderStack
    absent: Absent
    unembed: Unembed | None
    rows: HeadRows | None
    projections: Projections
    alone: LayersAlone

    @property
    def attention(self) -> AttentionLayers:
        """Which attention is a layer's."""
        return self.alone.attention


def read_model(
    model: nn.Module,
    run: TrialPass,
    vllm_config: Any,
    device: torch.device,
    *,
    largest: int,
    without_adapters: Callable[[int], None] = lambda _: None,
) -> ReadModel:
    """What `model` is found to be.

    `run` makes trial passes, of `largest` tokens at most; `without_adapters` says of so many coming
    rows that they are the model's own. Raises `Unsupported` for a model that
    cannot be steered, or not at the sites that the options name.
    """
    config = vllm_config.model_config
    if config.is_encoder_decoder:
        raise unsupported(model, "it is an encoder with a decoder")
    decoder = find_decoder(model, config.get_total_num_hidden_layers())
    width, experts = config.get_hidden_size(), bool(config.is_moe)
    search = AttentionSearch(decoder, vllm_config.compilation_config.static_forward_context)
    with search.looking():
        streams = read_streams(decoder, run, width=width, largest=largest, experts=experts)
    options = SteerOptions.stamped(vllm_config.additional_config)
    asked = None if options.sites == "all" else options.sites
    inner, absent = open_inner_sites(decoder, run, asked, width=width, largest=largest)
    if is_static(vllm_config, options):
        check_unsplit(inner)
    stack = choose_stack(decoder, streams, inner)
    return ReadModel(
        stack,
        absent,
        find_unembedding(decoder, streams),
        find_rows(decoder, streams),
        find_projections(stack, shards_of(stack.inner), device, config.dtype),
        LayersAlone(
            search.calls,
            search.found(*own_rank(vllm_config)),
            partial(_without_cache, vllm_config),
            without_adapters,
            largest,
        ),
    )


def _without_cache(vllm_config: Any) -> AbstractContextManager[Any]:
    """What layers run in, without a cache. How many tokens they are given is not said: engines with
    experts would then agree upon it with their data-parallel others, which are not asked."""
    from vllm.forward_context import set_forward_context  # noqa: PLC0415

    context: AbstractContextManager[Any] = set_forward_context(None, vllm_config)
    return context


def block_states(read: ReadModel, steering: WorkerSteering, vllm_config: Any) -> BlockStates:
    """The blocks of the layers that were read and tapped, to be run by themselves."""
    return BlockStates(
        read.alone,
        read.projections.shards,
        steering.model,
        steering.tapped,
        experts_apart=bool(vllm_config.model_config.is_moe)
        and vllm_config.parallel_config.data_parallel_size > 1,
    )


def attach(
    read: ReadModel, vllm_config: Any, device: torch.device, *, tapped: Callable[[], None]
) -> WorkerSteering:
    """Taps the layers that were read and gives the worker's steering. `tapped` is called while all
    taps are in place, and may refuse what it finds: an eager engine's are out again afterwards."""
    options = SteerOptions.stamped(vllm_config.additional_config)
    static = is_static(vllm_config, options)
    stack = read.stack
    info = model_info(vllm_config, read)
    shards = shards_of(stack.inner)
    sizes = _Sizes.of(vllm_config)
    shifts = _shift_tables(info, sizes, options, device) if compiles(vllm_config) else None
    make_tap = partial(_tap, shifts=shifts, static=static)

    def put_in() -> None:
        install(stack, make_tap)
        tapped()

    edits: Edits
    if static:
        edits = _static_edits(info, stack, sizes, options, device)
        put_in()
    elif shifts is not None:  # taps are traced
        edits = TapEdits(info, sizes.requests, device, shards)
        put_in()
    else:
        modules = {number: layer.modules() for number, layer in stack.layers}
        switch = TapSwitch(modules, put_in)
        edits = TapEdits(info, sizes.requests, device, shards, switch=switch)
    store = PlanStore(registry_location())
    load = plan_loader(store, info)
    if shards:
        load = load_together(load)
    stages = vllm_config.parallel_config.pipeline_parallel_size
    return WorkerSteering(
        info,
        load if stages == 1 else (lambda sha256: own_part(load(sha256), stack)),
        edits,
        max_requests=sizes.requests,
        shifts=shifts,
        owns=stack.owns,
        stages=stages,
        drafts=vllm_config.num_speculative_tokens,
        load_readouts=readouts_loader(store),
        instruments=Instruments(
            device,
            read.unembed if reads_lenses(read, vllm_config) else None,
            vocab_size=info.vocab_size,
        ),
        attention=read.attention,
    )


def reads_lenses(read: ReadModel, vllm_config: Any) -> bool:
    """Whether this worker reads states as tokens within its steps: it has the head, whose layers
    are all here, and no adapter changes it between the requests of a batch."""
    stages = vllm_config.parallel_config.pipeline_parallel_size
    return read.unembed is not None and stages == 1 and vllm_config.lora_config is None


class _Sizes(NamedTuple):
    """The most requests and the most tokens of one pass, padding among these."""

    requests: int
    tokens: int

    @staticmethod
    def of(vllm_config: Any) -> _Sizes:
        scheduler = vllm_config.scheduler_config
        captured = vllm_config.compilation_config.cudagraph_capture_sizes or [0]
        return _Sizes(scheduler.max_num_seqs, max(scheduler.max_num_batched_tokens, *captured))


def _static_edits(
    info: ModelInfo, stack: DecoderStack, sizes: _Sizes, options: SteerOptions, device: torch.device
) -> StaticEdits:
    """Edits in kernels, which the operators of this process launch from now on."""
    encoders = DeviceEncoders(device)
    form = StaticForm(
        info,
        stack.taps,
        max_requests=sizes.requests,
        batch_tokens=sizes.tokens,
        edit_rows=options.edit_rows,
        device=device,
        latents=options.latents_at_once,
        encoders=encoders,
    )
    set_form(form)
    return StaticEdits(form, TapEdits(info, sizes.requests, device, encoders=encoders))


def _shift_tables(
    info: ModelInfo, sizes: _Sizes, options: SteerOptions, device: torch.device
) -> ShiftTables:
    specs = min(sizes.requests, _SHIFT_SPECS)
    return ShiftTables(
        2 * info.n_layers + 1,
        info.d_model,
        variants=2 * sizes.requests + 1,
        bank_rows=1 + (options.shift_rows or specs * info.n_layers),
        batch_tokens=sizes.tokens,
        device=device,
    )


def _tap(index: int, shifts: ShiftTables | None, *, static: bool) -> nn.Module:
    if shifts is None:
        return OpaqueTap(index, static=True) if static else EagerTap(index)
    opaque = OpaqueTap(index, static=static)
    return opaque if index < 0 else CompiledTap(index, shifts, opaque)


def compiles(vllm_config: Any) -> bool:
    """Whether vLLM will run the model through torch.compile."""
    return str(vllm_config.compilation_config.mode.name) != "NONE"


def model_info(vllm_config: Any, read: ReadModel) -> ModelInfo:
    """The shape of the model that vLLM serves, whose layers were read."""
    config = vllm_config.model_config
    widths = {one.site: one.width for one in read.stack.inner}
    heads = int(getattr(config.hf_text_config, "num_attention_heads", 0)) or None
    over_heads = widths.get("head_out")
    if over_heads is not None and (heads is None or over_heads % heads):
        raise Unsupported(
            f"the rows of 'head_out' have {over_heads} numbers, which the {heads} heads of "
            f"{config.architectures[0]} do not share: leave the site out of additional_config"
            f"[{KEY!r}]['sites']",
            code="unsupported_site",
        )
    return ModelInfo(
        name=str(config.served_model_name or config.model),
        architecture=config.architectures[0],
        n_layers=config.get_total_num_hidden_layers(),
        d_model=config.get_hidden_size(),
        vocab_size=config.get_vocab_size(),
        max_length=config.max_model_len,
        dtype=str(config.dtype).removeprefix("torch."),
        sites=read.stack.sites,
        d_mlp=widths.get("mlp_act"),
        n_heads=heads,
        head_dim=None if over_heads is None or heads is None else over_heads // heads,
        absent=tuple(read.absent.items()),
    )


def plan_loader(store: PlanStore, model: ModelInfo) -> Callable[[str], SteeringPlan]:
    """Plans by their hash in `store`, the last ones kept in memory."""

    @lru_cache(_KEPT_PLANS)
    def load(sha256: str) -> SteeringPlan:
        return load_plan(store.get(sha256), store.sae, model=model)

    return load


def readouts_loader(store: PlanStore) -> Callable[[str], ReadoutPlan]:
    """Read-outs by their hash in `store`, the last ones kept in memory."""

    @lru_cache(_KEPT_READOUTS)
    def load(sha256: str) -> ReadoutPlan:
        return load_readouts(store.get(sha256), store)

    return load
