"""Random three-layer models of every architecture under test, and a tokenizer for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from steer.engines.fake.tokenizer import ByteTokenizer

VOCABULARY, WIDTH, LAYERS = 99, 32, 3
_SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # far above the usual, so that every block moves the stream
}
_GROUPED = {"num_key_value_heads": 2}
_ENDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}

BUILDERS: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**_SHAPE, **_GROUPED, **_ENDS)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**_SHAPE, **_GROUPED, **_ENDS, head_dim=16)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY,
            n_embd=WIDTH,
            n_layer=LAYERS,
            n_head=4,
            n_positions=128,
            initializer_range=0.2,
            **_ENDS,
        )
    ),
    "neox-parallel": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**_SHAPE, **_ENDS, use_parallel_residual=True)
    ),
    "neox-sequential": lambda: GPTNeoXForCausalLM(
        GPTNeoXConfig(**_SHAPE, **_ENDS, use_parallel_residual=False)
    ),
    "gemma3": lambda: Gemma3ForCausalLM(
        Gemma3TextConfig(
            **_SHAPE,
            **_GROUPED,
            **_ENDS,
            head_dim=16,
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )
    ),
    "mixtral": lambda: MixtralForCausalLM(
        MixtralConfig(**_SHAPE, **_GROUPED, **_ENDS, num_local_experts=4, num_experts_per_tok=2)
    ),
}
ARCHITECTURES = tuple(BUILDERS)


def build(name: str) -> PreTrainedModel:
    torch.manual_seed(list(BUILDERS).index(name))
    return BUILDERS[name]().eval()


def byte_model(**changes: Any) -> LlamaForCausalLM:
    """A random Llama, by default of three layers, over the bytes of `ByteTokenizer`."""
    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        **changes,
    }
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size, eos_token_id=ByteTokenizer.eos_token_id, **sizes
    )
    return LlamaForCausalLM(config)


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Words `w3` … `w98`, split at spaces, and three special tokens."""
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{n}": n for n in range(3, VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )
