"""Matching pursuit: features are picked one by one, each the best for what is left of the token.

    r ← x − b_dec;  repeat:  j = argmax ReLU(⟨d, r⟩), z_j += ⟨d_j, r⟩₊, r ← r − ⟨d_j, r⟩₊ d_j

until ‖r‖ is below `residual_threshold`, no new feature was picked, or so many steps are done
(MP-SAE, 2506.03093).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from steer.artefacts.sae.architecture import Architecture
from steer.artefacts.sae.relu import activate
from steer.artefacts.sae.storage.rows import FeatureRows


class Pursuit(BaseModel):
    """When matching pursuit stops; `max_iterations` None stands for the width."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    residual_threshold: float = Field(default=1e-2, ge=0)
    max_iterations: int | None = Field(default=None, ge=1)
    stop_on_duplicate_support: bool = True


def pursue(
    inputs: Float[Tensor, "... d"], rows: FeatureRows, rule: Pursuit, *, k: int | None = None
) -> Float[Tensor, "... d_sae"]:
    """The activations of tokens from which b_dec is subtracted already; at most `k` steps."""
    left = inputs.reshape(-1, inputs.shape[-1])
    z = left.new_zeros(len(left), rows.shape[0])
    done = torch.zeros(len(left), dtype=torch.bool, device=left.device)
    for _ in range(k or rule.max_iterations or inputs.shape[-1]):
        best = rows.along(left).relu().argmax(-1)
        picked = rows.take(best.tolist())
        value = (left * picked).sum(-1).relu() * ~done
        before = z != 0
        z.scatter_add_(1, best[:, None], value[:, None])
        left = left - value[:, None] * picked
        if rule.stop_on_duplicate_support:
            done = done | ((z != 0) == before).all(-1)
        if rule.residual_threshold > 0:
            done = done | (left.norm(dim=-1) < rule.residual_threshold)
        if bool(done.all()):
            break
    return z.reshape(*inputs.shape[:-1], -1)


PURSUIT = Architecture(
    "matching_pursuit", activate, competitive=True, iterative=True, source="2506.03093"
)
