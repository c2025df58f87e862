"""The models to measure on, and a registry of artefacts that fit each of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from steer_vectors import LIBRARY

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.sae.base import SAE
from steer.model import Capabilities, ModelInfo
from steer.registry.registry import Registry
from steer.spec import KINDS, Site

VECTORS = 8
FEATURES = 1024
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
MAX_LENGTH = 256
SLOTS = 64


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes; `path` is None where the weights are random and written on demand."""

    name: str
    d_model: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    path: Path | None = None

    def model(self, folder: Path) -> Path:
        """The model's folder, below `folder` where it has to be written; the seed is fixed."""
        if self.path is not None:
            return self.path
        from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads,
            max_position_embeddings=MAX_LENGTH,
            tie_word_embeddings=False,
        )
        found = folder / f"model-{self.name}"
        LlamaForCausalLM(config).save_pretrained(found)
        return found

    def info(self, max_length: int = MAX_LENGTH) -> ModelInfo:
        """The model as Steer sees it."""
        return ModelInfo(
            name=self.name,
            architecture="LlamaForCausalLM",
            n_layers=self.layers,
            d_model=self.d_model,
            vocab_size=self.vocabulary,
            max_length=max_length,
            sites=SITES,
        )

    @property
    def middle(self) -> int:
        """The layer that single-layer specs steer."""
        return self.layers // 2


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("100m", d_model=1024, layers=8, heads=16, ffn=2816, vocabulary=8192),
        Shape("demo", 192, 6, 6, 0, 3072, LIBRARY / "demo" / "model"),
    )
}
CAPABILITIES = Capabilities("vllm", KINDS, SITES)


def register(registry: Registry, shape: Shape) -> None:
    """Random artefacts of the shape's width: vectors `v0` … on every layer, the SAEs `jumprelu`
    and `topk` and the adapter `reft` on the middle one."""
    generator = torch.Generator().manual_seed(1)
    width = shape.d_model

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    for n in range(VECTORS):
        rows = {layer: draw(width) / width**0.5 for layer in range(shape.layers)}
        registry.add(f"v{n}", ControlVector.of(rows))
    for name in ("jumprelu", "topk"):
        registry.add(
            name,
            SAE.of(
                name,
                W_enc=draw(width, FEATURES) / width**0.5,
                b_enc=0.1 * draw(FEATURES),
                W_dec=draw(FEATURES, width) / width**0.5,
                b_dec=0.1 * draw(width),
                threshold=0.2 * draw(FEATURES).abs() if name == "jumprelu" else None,
                k=16 if name == "topk" else None,
                layer=shape.middle,
            ),
        )
    rotation = torch.linalg.qr(draw(width, 4))[0].T.contiguous()
    adapter = {shape.middle: (rotation, draw(4, width) / width**0.5, draw(4))}
    registry.add("reft", LowRankAdapter.of(adapter))
