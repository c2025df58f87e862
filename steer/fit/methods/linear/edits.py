"""Linear edits as low-rank adapters: x + Σ_k write_k·⟨read_k, x⟩ on the kind `low_rank`."""

from __future__ import annotations

import torch
from torch import Tensor


def linear_parts(read: Tensor, write: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """R, W and b for which x + Rᵀ(Wx + b − Rx) is x + writeᵀ(read x), `[k, d]` each, b zero.

    R are the unit rows of `write`, whose lengths go into what is read. Assumes: no row of `write`
    is zero.
    """
    lengths = write.norm(dim=-1, keepdim=True)
    rotation = write / lengths
    return rotation, lengths * read + rotation, torch.zeros(len(read), dtype=read.dtype)
