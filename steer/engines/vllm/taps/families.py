"""The families whose layers were read: where their five sites are.

A family is named by two classes with their modules: the one that runs the decoder layers, and the
layer. Both are needed: a model may reuse a known layer and change the stream between layers, and
class names repeat. Models that are not here have the ends of their layers, as far as trial passes
show what those are (`streams.py`).

`tests/vllm/test_architectures.py` runs the families that transformers can write a small model of;
InternLM2, EXAONE 3, MiniMax-M2, PhiMoE and MiniCPM were read only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from steer.engines.vllm.taps.layer_streams import EndsOnly, FusedAdd, PlainAdd
from steer.engines.vllm.taps.taps import Layout

_VLLM = "vllm.model_executor.models"
_HF = "transformers.models"


@dataclass(frozen=True)
class Family:
    """`owner` runs the layers of class `layer`.

    `where` are attributes that every layer must have for `layout` to describe it, and
    `owner_where` the same for the owner.
    """

    owner: str
    layer: str
    layout: Layout
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
    _vllm("exaone", "ExaoneModel", "ExaoneDecoderLayer", FusedAdd("ln_2")),
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
    _vllm("gpt2", "GPT2Model", "GPT2Block", PlainAdd("attn", "ln_2", "mlp")),
    _vllm(
        "opt",
        "OPTDecoder",
        "OPTDecoderLayer",
        PlainAdd("self_attn", "final_layer_norm", "fc2"),
        where={"do_layer_norm_before": True},  # OPT-350m normalises the stream itself
        owner_where={"project_out": None},
    ),
    _vllm(
        "bloom",
        "BloomModel",
        "BloomBlock",
        PlainAdd("self_attention", "post_attention_layernorm", "mlp"),
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
    _vllm("gpt_j", "GPTJModel", "GPTJBlock", EndsOnly()),
    _vllm("falcon", "FalconModel", "FalconDecoderLayer", EndsOnly()),
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
        where={"use_parallel_residual": False},
    ),
    _hf(
        "gpt_neox",
        "GPTNeoXModel",
        "GPTNeoXLayer",
        EndsOnly(),
        where={"use_parallel_residual": True},
    ),
    _hf("phi", "PhiModel", "PhiDecoderLayer", EndsOnly()),
)
