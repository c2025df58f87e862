"""Tiny random models behind the real engine, and the same models computed by hand."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine

LAYERS, WIDTH = 3, 32
_SIZES = {"vocab_size": ByteTokenizer.vocab_size}


def _llama() -> nn.Module:
    config = LlamaConfig(
        **_SIZES,
        hidden_size=WIDTH,
        num_hidden_layers=LAYERS,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def _gpt2() -> nn.Module:
    config = GPT2Config(
        **_SIZES,
        n_embd=WIDTH,
        n_layer=LAYERS,
        n_head=4,
        n_positions=128,
        initializer_range=0.3,
        bos_token_id=ByteTokenizer.bos_token_id,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    return GPT2LMHeadModel(config)


@dataclass(frozen=True)
class Subject:
    """A model, the engine that serves it, and its parts for direct computation."""

    engine: TransformersEngine
    model: nn.Module
    blocks: nn.ModuleList
    norm: nn.Module

    def states(self, ids: tuple[int, ...]) -> list[Tensor]:
        """Every block's output `[tokens, WIDTH]`, read by plain hooks."""
        found: list[Tensor] = []
        handles = [
            block.register_forward_hook(lambda _m, _a, out: found.append(_first(out)[0].clone()))
            for block in self.blocks
        ]
        try:
            self.logits(ids)
        finally:
            for handle in handles:
                handle.remove()
        return found

    def logits(self, ids: tuple[int, ...]) -> Tensor:
        """`[tokens, vocab]`."""
        with torch.no_grad():
            return self.model(torch.tensor([ids]), use_cache=False).logits[0]

    def read(self, state: Tensor) -> Tensor:
        """Final norm and output matrix."""
        with torch.no_grad():
            return self.model.lm_head(self.norm(state))

    def patched_logits(
        self, ids: tuple[int, ...], layer: int, position: int, state: Tensor
    ) -> Tensor:
        """`[tokens, vocab]` with one block's output replaced at one position, by a plain hook."""

        def replace(_module: nn.Module, _args: object, out: Tensor | tuple[Tensor, ...]) -> object:
            x = _first(out).clone()
            x[:, position] = state
            return x if isinstance(out, Tensor) else (x, *out[1:])

        handle = self.blocks[layer].register_forward_hook(replace)
        try:
            return self.logits(ids)
        finally:
            handle.remove()

    def patched_text(
        self, ids: tuple[int, ...], layer: int, position: int, state: Tensor, steps: int
    ) -> str:
        """Greedy tokens under the patch; every step computes the whole sequence anew."""
        tokens = list(ids)
        for _ in range(steps):
            logits = self.patched_logits(tuple(tokens), layer, position, state)[-1]
            tokens.append(int(logits.argmax()))
            if tokens[-1] == ByteTokenizer.eos_token_id:
                break
        return ByteTokenizer().decode(tokens[len(ids) :], skip_special_tokens=True)


def _first(output: Tensor | tuple[Tensor, ...]) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


@pytest.fixture(scope="module", params=["llama", "gpt2"])
def subject(request: pytest.FixtureRequest) -> Iterator[Subject]:
    torch.manual_seed(7)
    model = (_llama if request.param == "llama" else _gpt2)().eval()
    inner = model.model if request.param == "llama" else model.transformer
    blocks = inner.layers if request.param == "llama" else inner.h
    norm = inner.norm if request.param == "llama" else inner.ln_f
    with TransformersEngine(model, ByteTokenizer(), name="tiny", rows=8, slots=6) as engine:
        yield Subject(engine, model, blocks, norm)


@pytest.fixture
def engine(subject: Subject) -> TransformersEngine:
    return subject.engine
