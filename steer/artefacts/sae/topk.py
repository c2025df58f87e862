"""TopK and its kin: a set number of a token's features survive, so that all of them compete.

topk: the k largest pre-activations, if positive (2406.04093). groupmax: the largest of each of k
groups of neighbours, if positive (EleutherAI's sparsify). abstopk: the k largest by magnitude, with
their signs (2510.00404).
"""

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


def activate_groups(pre: Tensor, *, threshold: Tensor | None, k: int | None) -> Tensor:
    """The best of each of k groups of d_sae / k neighbours."""
    del threshold
    assert k is not None, "checked when the SAE was built"
    groups = pre.reshape(*pre.shape[:-1], k, -1)
    values, places = groups.max(dim=-1, keepdim=True)
    return torch.zeros_like(groups).scatter_(-1, places, values.relu()).flatten(-2)


def activate_signed(pre: Tensor, *, threshold: Tensor | None, k: int | None) -> Tensor:
    """The k largest by magnitude, negative ones too."""
    del threshold
    assert k is not None, "checked when the SAE was built"
    places = pre.abs().topk(k, dim=-1, sorted=False).indices
    return torch.zeros_like(pre).scatter_(-1, places, pre.gather(-1, places))


TOPK = Architecture("topk", activate, needs_k=True, competitive=True, source="2406.04093")
GROUPMAX = Architecture("groupmax", activate_groups, needs_k=True, competitive=True, grouped=True)
ABSTOPK = Architecture(
    "abstopk", activate_signed, needs_k=True, competitive=True, signed=True, source="2510.00404"
)
