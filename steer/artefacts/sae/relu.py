"""The standard SAE: f = ReLU(a) (Sparse Autoencoders, 2309.08600)."""

from __future__ import annotations

from torch import Tensor

from steer.artefacts.sae.architecture import Architecture


def activate(pre: Tensor, *, threshold: Tensor | None, k: int | None) -> Tensor:
    """Every feature by itself: the positive part of its pre-activation."""
    del threshold, k
    return pre.relu()


RELU = Architecture("standard", activate, aliases=("relu",), source="2309.08600")
