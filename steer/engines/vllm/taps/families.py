"""The families whose layers were read: where their sites are.

A family is named by two classes with their modules: the one that runs the decoder layers, and the
layer. Both are needed: a model may reuse a known layer and change the stream between layers, and
class names repeat. Models that are not here have the ends of their layers, as far as trial passes
show what those are (`streams.py`).

`tests/vllm/test_architectures.py` runs the families that transformers can write a small model of;
InternLM2, EXAONE 3, MiniMax-M2, PhiMoE and MiniCPM were read only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from steer.engines.vllm.taps.layer_streams import EndsOnly, FusedAdd, PlainAdd
from steer.engines.vllm.taps.taps import Layout
from steer.spec import Site

_VLLM = "vllm.model_executor.models"
_HF = "transformers.models"


Inside = Mapping[Site, str]
"""The modules of a layer whose inputs are sites, by their paths from the layer."""


@dataclass(frozen=True)
class Family:
    """`owner` runs the layers of class `layer`.

    `inside` names, from the layer, the modules whose inputs are sites inside attention and MLP.
    `where` are attributes that every layer must have for this to describe it, and `owner_where` the
    same for the owner.
    """

    owner: str
    layer: str
    layout: Layout
    inside: Inside
    where: dict[str, Any] = field(default_factory=dict)
    owner_where: dict[str, Any] = field(default_factory=dict)


def _parts(
    attention: str = "self_attn.o_proj", mlp: str = "mlp.down_proj", *, norms: bool = True
) -> Inside:
    """The sites of parts whose output projections are `attention` and `mlp`, each in its part.

    `norms` is whether each part has a norm before it that it alone reads.
    """
    sites: dict[Site, str] = {"head_out": attention, "mlp_act": mlp}
    if norms:
        sites |= {"attn_in": attention.rpartition(".")[0], "mlp_in": mlp.rpartition(".")[0]}
    return sites


def _experts(attention: str = "self_attn.o_proj", mlp: str = "mlp") -> Inside:
    """The sites of layers whose MLP `mlp` is a mixture of experts: neurons have no one place."""
    return {"head_out": attention, "attn_in": attention.rpartition(".")[0], "mlp_in": mlp}


def _vllm(
    module: str, owner: str, layer: str, layout: Layout, inside: Inside | None = None, **more: Any
) -> Family:
    home = f"{_VLLM}.{module}"
    return Family(f"{home}.{owner}", f"{home}.{layer}", layout, inside or _parts(), **more)


def _hf(
    module: str, owner: str, layer: str, layout: Layout, inside: Inside | None = None, **more: Any
) -> Family:
    home = f"{_HF}.{module}.modeling_{module}"
    return Family(f"{home}.{owner}", f"{home}.{layer}", layout, inside or _parts(), **more)


_POST_ATTENTION = FusedAdd("post_attention_layernorm")
_SANDWICH = FusedAdd("pre_feedforward_layernorm")
_PRE_NORM = PlainAdd("self_attn", "post_attention_layernorm", "mlp")
_POST_NORM = PlainAdd("post_attention_layernorm", "mlp", "post_feedforward_layernorm")

_NEOX = _parts("attention.dense", "mlp.dense_4h_to_h")
_EXAONE: Inside = {
    "attn_in": "attn",
    "head_out": "attn.attention.out_proj",
    "mlp_in": "mlp",
    "mlp_act": "mlp.c_proj",
}
# The norm before the experts is read by the shared MLP as well.
_GRANITE_SHARED: Inside = {"attn_in": "self_attn", "head_out": "self_attn.o_proj"}

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
    _vllm(
        "internlm2",
        "InternLM2Model",
        "InternLMDecoderLayer",
        FusedAdd("ffn_norm"),
        _parts("attention.wo", "feed_forward.w2"),
    ),
    _vllm("exaone", "ExaoneModel", "ExaoneDecoderLayer", FusedAdd("ln_2"), _EXAONE),
    # The same with mixtures of experts, whose sum over all workers ends inside the MLP.
    _vllm(
        "mixtral",
        "MixtralModel",
        "MixtralDecoderLayer",
        _POST_ATTENTION,
        _experts(mlp="block_sparse_moe"),
    ),
    _vllm("qwen2_moe", "Qwen2MoeModel", "Qwen2MoeDecoderLayer", _POST_ATTENTION, _experts()),
    _vllm("qwen3_moe", "Qwen3MoeModel", "Qwen3MoeDecoderLayer", _POST_ATTENTION, _experts()),
    _vllm("olmoe", "OlmoeModel", "OlmoeDecoderLayer", _POST_ATTENTION, _experts()),
    _vllm("glm4_moe", "Glm4MoeModel", "Glm4MoeDecoderLayer", _POST_ATTENTION, _experts()),
    _vllm(
        "ernie45_moe", "Ernie4_5_MoeModel", "Ernie4_5_MoeDecoderLayer", _POST_ATTENTION, _experts()
    ),
    _vllm(
        "minimax_m2",
        "MiniMaxM2Model",
        "MiniMaxM2DecoderLayer",
        _POST_ATTENTION,
        _experts(mlp="block_sparse_moe"),
    ),
    _vllm("gpt_oss", "GptOssModel", "TransformerBlock", _POST_ATTENTION, _experts("attn.o_proj")),
    # vLLM's own, with a plain stream.
    _vllm(
        "gpt2",
        "GPT2Model",
        "GPT2Block",
        PlainAdd("attn", "ln_2", "mlp"),
        _parts("attn.c_proj", "mlp.c_proj"),
    ),
    _vllm(
        "opt",
        "OPTDecoder",
        "OPTDecoderLayer",
        PlainAdd("self_attn", "final_layer_norm", "fc2"),
        {
            "attn_in": "self_attn",
            "head_out": "self_attn.out_proj",
            "mlp_in": "fc1",
            "mlp_act": "fc2",
        },
        where={"do_layer_norm_before": True},  # OPT-350m normalises the stream itself
        owner_where={"project_out": None},
    ),
    _vllm(
        "bloom",
        "BloomModel",
        "BloomBlock",
        PlainAdd("self_attention", "post_attention_layernorm", "mlp"),
        _parts("self_attention.dense", "mlp.dense_4h_to_h"),
        where={"apply_residual_connection_post_layernorm": False},
    ),
    _vllm("stablelm", "StableLMEpochModel", "StablelmDecoderLayer", _PRE_NORM),
    _vllm("exaone4", "Exaone4Model", "Exaone4DecoderLayer", _POST_NORM, _parts(norms=False)),
    _vllm(
        "phimoe",
        "PhiMoEModel",
        "PhiMoEDecoderLayer",
        PlainAdd("self_attn", "post_attention_layernorm", "block_sparse_moe"),
        _experts(mlp="block_sparse_moe"),
    ),
    # Parts scaled (Granite, MiniCPM) or in parallel (GPT-J, Falcon, Cohere): ends alone.
    _vllm("granite", "GraniteModel", "GraniteDecoderLayer", EndsOnly()),
    _vllm(
        "granitemoe",
        "GraniteMoeModel",
        "GraniteMoeDecoderLayer",
        EndsOnly(),
        _experts(mlp="block_sparse_moe"),
    ),
    _vllm(
        "granitemoeshared",
        "GraniteMoeSharedModel",
        "GraniteMoeSharedDecoderLayer",
        EndsOnly(),
        _GRANITE_SHARED,
    ),
    _vllm("minicpm", "MiniCPMModel", "MiniCPMDecoderLayer", EndsOnly()),
    _vllm(
        "gpt_j",
        "GPTJModel",
        "GPTJBlock",
        EndsOnly(),
        _parts("attn.out_proj", "mlp.fc_out", norms=False),
    ),
    _vllm(
        "falcon",
        "FalconModel",
        "FalconDecoderLayer",
        EndsOnly(),
        _parts("self_attention.dense", "mlp.dense_4h_to_h", norms=False),
    ),
    _vllm("commandr", "CohereModel", "CohereDecoderLayer", EndsOnly(), _parts(norms=False)),
    # Models of transformers that vLLM serves with its own attention and matrices.
    _hf("olmo", "OlmoModel", "OlmoDecoderLayer", _PRE_NORM),
    _hf("olmo2", "Olmo2Model", "Olmo2DecoderLayer", _POST_NORM, _parts(norms=False)),
    _hf("olmo3", "Olmo3Model", "Olmo3DecoderLayer", _POST_NORM, _parts(norms=False)),
    _hf(
        "starcoder2",
        "Starcoder2Model",
        "Starcoder2DecoderLayer",
        _PRE_NORM,
        _parts(mlp="mlp.c_proj"),
    ),
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
        _NEOX,
        where={"use_parallel_residual": False},
    ),
    _hf(
        "gpt_neox",
        "GPTNeoXModel",
        "GPTNeoXLayer",
        EndsOnly(),
        _NEOX,
        where={"use_parallel_residual": True},
    ),
    _hf(
        "phi",
        "PhiModel",
        "PhiDecoderLayer",
        EndsOnly(),
        _parts("self_attn.dense", "mlp.fc2", norms=False),
    ),
)
