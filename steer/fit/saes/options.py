"""Sizes and rates of a training."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Trained: TypeAlias = Literal["topk", "batchtopk", "jumprelu", "matching_pursuit"]
TRAINED: tuple[Trained, ...] = ("topk", "batchtopk", "jumprelu", "matching_pursuit")


@dataclass(frozen=True)
class SAEOptions:
    """What is trained, and how.

    `k` latents are active on a token: exactly (`topk`), on average (`batchtopk`, and `jumprelu`
    through a penalty), or picked one after the other (`matching_pursuit`). A latent is dead once
    `dead_after` tokens, or a tenth of all, have passed without it; `aux_k` dead ones at a time then
    learn what the others leave over, with the weight `aux_weight` (2406.04093). `epochs` are passes
    over the rows; the rate rises over the first steps and falls over the last fifth.

    `guide_weight` is that of the labels (G-SAE, 2506.19382), where rows have labels;
    `prediction_weight` that of the divergence of the model's own predictions when it runs on what
    the SAE rebuilds (end-to-end SAEs, 2405.12241), of `prediction_texts` texts every
    `prediction_every` steps.
    """

    architecture: Trained = "topk"
    latents: int = 4096
    k: int = 32
    epochs: float = 1.0
    batch: int = 2048
    rate: float = 1e-3
    dead_after: int = 400_000
    aux_k: int = 256
    aux_weight: float = 1 / 32
    sparsity_weight: float = 1.0
    guide_weight: float = 1.0
    prediction_weight: float = 0.0
    prediction_texts: int = 4
    prediction_every: int = 4
    seed: int = 0
