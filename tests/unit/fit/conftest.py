from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine


@pytest.fixture(scope="package")
def engine() -> Iterator[TransformersEngine]:
    """A random three-layer model over bytes."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with TransformersEngine(model, ByteTokenizer(), name="tiny", rows=8, slots=16) as running:
        yield running


@pytest.fixture(scope="package")
def lively() -> Iterator[TransformersEngine]:
    """The same with larger weights: its blocks move the stream, and its words can be chosen."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        eos_token_id=ByteTokenizer.eos_token_id,
        initializer_range=0.2,
    )
    model = LlamaForCausalLM(config)
    with TransformersEngine(model, ByteTokenizer(), name="lively", rows=8, slots=16) as running:
        yield running
