"""TopK: the k largest pre-activations of a token survive, if positive (2406.04093)."""

from __future__ import annotations

import torch
from torch import Tensor

from steer.artefacts.sae.architecture import Architecture


def activate(pre: Tensor, *, threshold: Tensor | None, k: int | None) -> Tensor:
    """All features of a token compete: `pre` must hold every one of them."""
    del threshold
    assert k is not None, "checked when the SAE was built"
    values, places = pre.topk(k, dim=-1, sorted=False)
    return torch.zeros_like(pre).scatter_(-1, places, values.relu())


TOPK = Architecture("topk", activate, needs_k=True, competitive=True, source="2406.04093")
