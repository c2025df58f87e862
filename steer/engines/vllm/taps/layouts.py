"""Which of vLLM's models can be steered: a closed list of the families whose code was read.

A family is named by two classes with their modules: the one that runs the decoder layers, and the
layer. Both are needed. A model may reuse a known layer and change the stream between layers
(Solar mixes in earlier states, vision models add image features), and class names repeat. A layer
that is not here may return unreduced or sharded halves, and is refused by name.

`tests/vllm/test_architectures.py` runs the families that transformers can write a small model of;
InternLM2, EXAONE 3, MiniMax-M2, PhiMoE and MiniCPM were read only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from steer.engines.vllm.taps.layer_streams import EndsOnly, FusedAdd, PlainAdd
from steer.engines.vllm.taps.taps import DecoderStack, Layout
from steer.errors import Unsupported

_VLLM = "vllm.model_executor.models"
_HF = "transformers.models"
_MISSING = "PPMissingLayer"
"""vLLM's stand-in for what another pipeline stage owns."""


@dataclass(frozen=True)
class Family:
    """`owner` runs the layers of class `layer`, and `norm` is its last norm.

    `where` are attributes that every layer must have for `layout` to describe it, and
    `owner_where` the same for the owner.
    """

    owner: str
    layer: str
    layout: Layout
    norm: str = "norm"
    where: dict[str, Any] = field(default_factory=dict)
    owner_where: dict[str, Any] = field(default_factory=dict)


def _vllm(module: str, owner: str, layer: str, layout: Layout, **more: Any) -> Family:
    home = f"{_VLLM}.{module}"
    return Family(f"{home}.{owner}", f"{home}.{layer}", layout, **more)


def _hf(module: str, owner: str, layer: str, layout: Layout, **more: Any) -> Family:
    home = f"{_HF}.{module}.modeling_{module}"
    return Family(f"{home}.{owner}", f"{home}.{layer}", layout, **more)


_POST_ATTENTION = FusedAdd("post_attention_layernorm")
_SANDWICH = FusedAdd("pre_feedforward_layernorm")
_PRE_NORM = PlainAdd("self_attn", "post_attention_layernorm", "mlp")
_POST_NORM = PlainAdd("post_attention_layernorm", "mlp", "post_feedforward_layernorm")

FAMILIES: tuple[Family, ...] = (
    # vLLM's own, with a fused stream. LlamaModel also serves Phi3, InternLM3, Ernie4.5, TeleChat3.
    _vllm("llama", "LlamaModel", "LlamaDecoderLayer", _POST_ATTENTION),
    _vllm("mistral", "MistralModel", "MistralDecoderLayer", _POST_ATTENTION),
    _vllm("qwen2", "Qwen2Model", "Qwen2DecoderLayer", _POST_ATTENTION),
    _vllm("qwen3", "Qwen3Model", "Qwen3DecoderLayer", _POST_ATTENTION),
    _vllm("gemma", "GemmaModel", "GemmaDecoderLayer", _POST_ATTENTION),
    _vllm("gemma2", "Gemma2Model", "Gemma2DecoderLayer", _SANDWICH),
    _vllm("gemma3", "Gemma3Model", "Gemma3DecoderLayer", _SANDWICH),
    _vllm("glm4", "Glm4Model", "Glm4DecoderLayer", _POST_ATTENTION),
    _vllm("nemotron", "NemotronModel", "NemotronDecoderLayer", _POST_ATTENTION),
    _vllm("apertus", "ApertusModel", "ApertusDecoderLayer", FusedAdd("feedforward_layernorm")),
    _vllm("internlm2", "InternLM2Model", "InternLMDecoderLayer", FusedAdd("ffn_norm")),
    _vllm("exaone", "ExaoneModel", "ExaoneDecoderLayer", FusedAdd("ln_2"), norm="ln_f"),
    # The same with mixtures of experts, whose sum over all workers ends inside the MLP.
    _vllm("mixtral", "MixtralModel", "MixtralDecoderLayer", _POST_ATTENTION),
    _vllm("qwen2_moe", "Qwen2MoeModel", "Qwen2MoeDecoderLayer", _POST_ATTENTION),
    _vllm("qwen3_moe", "Qwen3MoeModel", "Qwen3MoeDecoderLayer", _POST_ATTENTION),
    _vllm("olmoe", "OlmoeModel", "OlmoeDecoderLayer", _POST_ATTENTION),
    _vllm("glm4_moe", "Glm4MoeModel", "Glm4MoeDecoderLayer", _POST_ATTENTION),
    _vllm("ernie45_moe", "Ernie4_5_MoeModel", "Ernie4_5_MoeDecoderLayer", _POST_ATTENTION),
    _vllm("minimax_m2", "MiniMaxM2Model", "MiniMaxM2DecoderLayer", _POST_ATTENTION),
    _vllm("gpt_oss", "GptOssModel", "TransformerBlock", _POST_ATTENTION),
    # vLLM's own, with a plain stream.
    _vllm("gpt2", "GPT2Model", "GPT2Block", PlainAdd("attn", "ln_2", "mlp"), norm="ln_f"),
    _vllm(
        "opt",
        "OPTDecoder",
        "OPTDecoderLayer",
        PlainAdd("self_attn", "final_layer_norm", "fc2"),
        norm="final_layer_norm",
        where={"do_layer_norm_before": True},  # OPT-350m normalises the stream itself
        owner_where={"project_out": None},
    ),
    _vllm(
        "bloom",
        "BloomModel",
        "BloomBlock",
        PlainAdd("self_attention", "post_attention_layernorm", "mlp"),
        norm="ln_f",
        where={"apply_residual_connection_post_layernorm": False},
    ),
    _vllm("stablelm", "StableLMEpochModel", "StablelmDecoderLayer", _PRE_NORM),
    _vllm("exaone4", "Exaone4Model", "Exaone4DecoderLayer", _POST_NORM),
    _vllm(
        "phimoe",
        "PhiMoEModel",
        "PhiMoEDecoderLayer",
        PlainAdd("self_attn", "post_attention_layernorm", "block_sparse_moe"),
    ),
    # Parts scaled (Granite, MiniCPM) or in parallel (GPT-J, Falcon, Cohere): the ends alone.
    _vllm("granite", "GraniteModel", "GraniteDecoderLayer", EndsOnly()),
    _vllm("granitemoe", "GraniteMoeModel", "GraniteMoeDecoderLayer", EndsOnly()),
    _vllm("granitemoeshared", "GraniteMoeSharedModel", "GraniteMoeSharedDecoderLayer", EndsOnly()),
    _vllm("minicpm", "MiniCPMModel", "MiniCPMDecoderLayer", EndsOnly()),
    _vllm("gpt_j", "GPTJModel", "GPTJBlock", EndsOnly(), norm="ln_f"),
    _vllm("falcon", "FalconModel", "FalconDecoderLayer", EndsOnly(), norm="ln_f"),
    _vllm("commandr", "CohereModel", "CohereDecoderLayer", EndsOnly()),
    # Models of transformers that vLLM serves with its own attention and matrices.
    _hf("olmo", "OlmoModel", "OlmoDecoderLayer", _PRE_NORM),
    _hf("olmo2", "Olmo2Model", "Olmo2DecoderLayer", _POST_NORM),
    _hf("olmo3", "Olmo3Model", "Olmo3DecoderLayer", _POST_NORM),
    _hf("starcoder2", "Starcoder2Model", "Starcoder2DecoderLayer", _PRE_NORM),
    _hf("smollm3", "SmolLM3Model", "SmolLM3DecoderLayer", _PRE_NORM),
    _hf("seed_oss", "SeedOssModel", "SeedOssDecoderLayer", _PRE_NORM),
    _hf("glm", "GlmModel", "GlmDecoderLayer", _PRE_NORM),
    _hf("arcee", "ArceeModel", "ArceeDecoderLayer", _PRE_NORM),
    _hf("cwm", "CwmModel", "CwmDecoderLayer", _PRE_NORM),
    _hf(
        "gpt_neox",
        "GPTNeoXModel",
        "GPTNeoXLayer",
        PlainAdd("attention", "post_attention_layernorm", "mlp"),
        norm="final_layer_norm",
        where={"use_parallel_residual": False},
    ),
    _hf(
        "gpt_neox",
        "GPTNeoXModel",
        "GPTNeoXLayer",
        EndsOnly(),
        norm="final_layer_norm",
        where={"use_parallel_residual": True},
    ),
    _hf("phi", "PhiModel", "PhiDecoderLayer", EndsOnly(), norm="final_layernorm"),
)


@dataclass(frozen=True)
class _Found:
    """A family in a model: its owner, and the layers that this worker has, by number."""

    family: Family
    owner: nn.Module
    layers: list[tuple[int, nn.Module]]


def find_stack(model: nn.Module, n_layers: int) -> DecoderStack:
    """The decoder layers of `model`, for its taps. Raises `Unsupported` naming what is unknown."""
    found = _find(model)
    for number, layer in found.layers:
        reason = found.family.layout.check(layer)
        if reason is not None:
            raise _unsupported(model, f"of its layer {number}, {_path(layer)}, {reason}")
    return DecoderStack(found.layers, found.family.layout, n_layers)


def find_unembedding(model: nn.Module) -> Callable[[Tensor], Tensor | None] | None:
    """The final norm and output matrix of `model`, from states `[T, d]` after the last layer to
    logits `[T, vocab]`, scaled and capped as the model does; None on a worker without them.

    Under tensor parallelism every worker must call it, and some are answered None. Raises
    `Unsupported` for a model that cannot be steered.
    """
    found = _find(model)
    norm = getattr(found.owner, found.family.norm)
    if type(norm).__name__ == _MISSING:
        return None
    compute_logits: Callable[[Tensor], Tensor | None] = model.compute_logits  # type: ignore[assignment]
    like = next(iter([*norm.parameters(), *found.owner.parameters()]))

    @torch.inference_mode()
    def unembed(states: Tensor) -> Tensor | None:
        normed = norm(states.to(like))
        return compute_logits(normed if isinstance(normed, Tensor) else normed[0])

    return unembed


def _find(model: nn.Module) -> _Found:
    stacks = list(_stacks(model))
    owners = {family.owner for family in FAMILIES}
    known = [stack for stack in stacks if _path(stack[0]) in owners]
    if len(known) != 1:
        many = "more than one" if known else "none"
        found = sorted(
            {f"{_path(one)} in {_path(owner)}" for owner, all_ in stacks for one in all_}
        )
        raise _unsupported(
            model,
            f"{many} of its stacks of layers is known to Steer ({'; '.join(found)})",
        )
    ((owner, modules),) = known
    layers = [(n, one) for n, one in enumerate(modules) if type(one).__name__ != _MISSING]
    kinds = sorted({_path(layer) for _, layer in layers})
    reasons = []
    for family in FAMILIES:
        if family.owner == _path(owner) and [family.layer] == kinds:
            reason = _differs(family, owner, layers)
            if reason is None:
                return _Found(family, owner, layers)
            reasons.append(reason)
    detail = "; ".join(reasons) or "they are not among the layers that Steer knows"
    raise _unsupported(model, f"its layers are {', '.join(kinds)} in {_path(owner)}: {detail}")


def _stacks(model: nn.Module) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """The outermost lists of layers in `model`, with the module that owns each."""
    for module in model.modules():
        for child in module.children():
            if isinstance(child, nn.ModuleList) and any(_is_layer(one) for one in child):
                yield module, child


def _is_layer(module: nn.Module) -> bool:
    """Whether `module` may be a decoder layer: it has attention inside."""
    return any("attention" in type(one).__name__.lower() for one in module.modules())


def _differs(family: Family, owner: nn.Module, layers: list[tuple[int, nn.Module]]) -> str | None:
    """Why `family` does not describe these layers; None where it does."""
    wanted = [(owner, family.owner_where)] + [(layer, family.where) for _, layer in layers]
    for module, values in wanted:
        for name, value in values.items():
            actual = getattr(module, name, None)
            if actual != value:
                return f"{type(module).__name__}.{name} is {actual!r} and not {value!r}"
    if not isinstance(getattr(owner, family.norm, None), nn.Module):
        return f"{type(owner).__name__} has no {family.norm}"
    return None


def _path(module: nn.Module) -> str:
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def _unsupported(model: nn.Module, reason: str) -> Unsupported:
    return Unsupported(
        f"{type(model).__name__} cannot be steered on vLLM: {reason}. Use the transformers engine, "
        "or a model of a supported architecture",
        code="unsupported_architecture",
    )
