"""GGUF files of a tiny random Llama, made as llama.cpp's own script makes them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map
from gguf.quants import quantize
from tokenizers import pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, GROUPS, LAYERS, WIDTH, HIDDEN = 4, 2, 3, 32, 64
CONTROL = ("<|start|>", "<|im_end|>", "<|endoftext|>")
TOKENS = (*sorted(pre_tokenizers.ByteLevel.alphabet()), "20", "26", "2026", *CONTROL)
MERGES = ("2 0", "2 6", "20 26")
START, END, OLD_END = (TOKENS.index(one) for one in CONTROL)
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
Quantised = GGMLQuantizationType

KEYS: Mapping[str, Any] = {
    "llama.block_count": LAYERS,
    "llama.context_length": 128,
    "llama.embedding_length": WIDTH,
    "llama.feed_forward_length": HIDDEN,
    "llama.attention.head_count": HEADS,
    "llama.attention.head_count_kv": GROUPS,
    "llama.attention.layer_norm_rms_epsilon": 1e-6,
    "llama.rope.freq_base": 10000.0,
    "llama.rope.dimension_count": WIDTH // HEADS,
    "llama.vocab_size": len(TOKENS),
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": list(TOKENS),
    "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in TOKENS],
    "tokenizer.ggml.merges": list(MERGES),
    "tokenizer.ggml.bos_token_id": START,
    "tokenizer.ggml.eos_token_id": END,
    "tokenizer.ggml.padding_token_id": END,
    "tokenizer.ggml.add_bos_token": False,
    "tokenizer.chat_template": TEMPLATE,
}


@cache
def tiny_llama() -> LlamaForCausalLM:
    """The model that the files hold; leave it as it is."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(TOKENS),
        hidden_size=WIDTH,
        intermediate_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=GROUPS,
        max_position_embeddings=128,
        initializer_range=0.2,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def tensors() -> dict[str, np.ndarray]:
    """The weights by their names in a GGUF, rotary pairs side by side as llama.cpp has them."""
    names = get_tensor_name_map(MODEL_ARCH.LLAMA, LAYERS)
    found = {}
    for name, weight in tiny_llama().state_dict().items():
        if name == "lm_head.weight":
            continue
        plain = name.removesuffix(".weight")
        heads = HEADS if "q_proj" in name else GROUPS if "k_proj" in name else None
        rows = weight if heads is None else _paired(weight, heads)
        found[f"{names.get_name(plain)}.weight"] = rows.numpy()
    return found


def _paired(weight: torch.Tensor, heads: int) -> torch.Tensor:
    rows, columns = weight.shape
    return weight.view(heads, 2, rows // heads // 2, columns).transpose(1, 2).reshape(rows, columns)


def write_gguf_model(
    path: Path,
    *,
    architecture: str = "llama",
    keys: Mapping[str, Any] | None = None,
    weights: Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]] = lambda found: found,
    kind: GGMLQuantizationType = Quantised.F32,
) -> Path:
    """A file of the tiny model; `keys` are put over its own, None takes one away."""
    writer = GGUFWriter(path, architecture)
    for key, value in {**KEYS, **(keys or {})}.items():
        _write(writer, key, value)
    for name, rows in weights(tensors()).items():
        packed = rows.ndim > 1 and kind is not Quantised.F32
        data = quantize(rows, kind) if packed else rows
        writer.add_tensor(name, data, raw_dtype=kind if packed else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _write(writer: GGUFWriter, key: str, value: Any) -> None:
    kinds = {bool: "bool", int: "uint32", float: "float32", str: "string", list: "array"}
    if value is not None:
        getattr(writer, f"add_{kinds[type(value)]}")(key, value)
