"""The models to measure on, and artefacts that fit each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from steer_vectors import LIBRARY

from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.artefact import Artefact
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.model import Capabilities, ModelInfo
from steer.spec import KINDS, Site

if TYPE_CHECKING:  # a host without the registry's packages measures kernels
    from steer.registry.registry import Registry

VECTORS = 8
FEATURES = 1024
READ_FEATURES = 4096
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
MAX_LENGTH = 256
SLOTS = 64


@dataclass(frozen=True)
class Shape:
    """A Llama by its sizes; `found` is where its weights are, or None where they are random.

    `kv_heads` are as many as `heads` where None is given; `length` is the longest sequence that
    servers take.
    """

    name: str
    d_model: int
    layers: int
    heads: int
    ffn: int
    vocabulary: int
    found: Callable[[], Path] | None = None
    kv_heads: int | None = None
    length: int = MAX_LENGTH

    def model(self, folder: Path, *, weights: bool = True) -> Path:
        """The model's folder, below `folder` where it has to be written; the seed is fixed. Without
        `weights` only what vLLM needs to make random ones itself."""
        if self.found is not None:
            return self.found()
        found = folder / f"model-{self.name}"
        config = self.config()
        if not weights:
            config.save_pretrained(found)
            return found
        from transformers import LlamaForCausalLM  # noqa: PLC0415

        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(found)
        return found

    def config(self, max_length: int | None = None) -> Any:
        """transformers' configuration of this shape."""
        from transformers import LlamaConfig  # noqa: PLC0415

        return LlamaConfig(
            architectures=["LlamaForCausalLM"],
            vocab_size=self.vocabulary,
            hidden_size=self.d_model,
            intermediate_size=self.ffn,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads or self.heads,
            max_position_embeddings=max_length or self.length,
            tie_word_embeddings=False,
        )

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


def _smollm2() -> Path:
    from steer.engines.transformers.checkpoints.found import find_model  # noqa: PLC0415

    return Path(find_model("smollm2").location)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("100m", d_model=1024, layers=8, heads=16, ffn=2816, vocabulary=8192),
        Shape("demo", 192, 6, 6, 0, 3072, lambda: LIBRARY / "demo" / "model"),
        Shape("smollm2", 576, 30, 9, 1536, 49_152, _smollm2, kv_heads=3, length=512),
        Shape("8b", 4096, 32, 32, 14_336, 128_256, kv_heads=8),
    )
}
CAPABILITIES = Capabilities("vllm", KINDS, SITES)


def artefacts(shape: Shape) -> dict[str, Artefact]:
    """Random artefacts of the shape's width, by name: vectors `v0` … on every layer, the SAEs
    `jumprelu` and `topk`, the adapter `reft`, the map `map` and the larger SAE `wide` on the middle
    one."""
    generator = torch.Generator().manual_seed(1)
    width = shape.d_model

    def draw(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=generator)

    made: dict[str, Artefact] = {}
    for n in range(VECTORS):
        rows = {layer: draw(width) / width**0.5 for layer in range(shape.layers)}
        made[f"v{n}"] = ControlVector.of(rows)
    for name in ("jumprelu", "topk"):
        made[name] = SAE.of(
            name,
            W_enc=draw(width, FEATURES) / width**0.5,
            b_enc=0.1 * draw(FEATURES),
            W_dec=draw(FEATURES, width) / width**0.5,
            b_dec=0.1 * draw(width),
            threshold=0.2 * draw(FEATURES).abs() if name == "jumprelu" else None,
            k=16 if name == "topk" else None,
            layer=shape.middle,
        )
    rotation = torch.linalg.qr(draw(width, 4))[0].T.contiguous()
    adapter = {shape.middle: (rotation, draw(4, width) / width**0.5, draw(4))}
    made["reft"] = LowRankAdapter.of(adapter)
    bound = draw(width).abs()
    channels = Channels(1.0 + 0.1 * draw(width), 0.1 * draw(width), -bound, bound)
    made["map"] = AffineMap.of({shape.middle: channels})
    made["wide"] = SAE.of(
        "jumprelu",
        W_enc=draw(width, READ_FEATURES) / width**0.5,
        b_enc=0.1 * draw(READ_FEATURES),
        W_dec=draw(READ_FEATURES, width) / width**0.5,
        b_dec=0.1 * draw(width),
        threshold=0.2 * draw(READ_FEATURES).abs(),
        layer=shape.middle,
    )
    return made


def register(registry: Registry, shape: Shape) -> None:
    """Puts the artefacts of `shape` into a registry."""
    for name, artefact in artefacts(shape).items():
        registry.add(name, artefact)


def library(shape: Shape) -> MemoryLibrary:
    """The artefacts of `shape` without a registry."""
    made = artefacts(shape)

    def of(kind: type) -> dict[str, Any]:
        return {name: one for name, one in made.items() if isinstance(one, kind)}

    return MemoryLibrary(of(ControlVector), of(SAE), of(LowRankAdapter), maps=of(AffineMap))
