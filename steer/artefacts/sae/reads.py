"""What a clamp needs to know of the features that it reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

from jaxtyping import Float
from torch import Tensor

Measure: TypeAlias = Literal["product", "cosine", "centred"]


@dataclass(frozen=True, eq=False)
class FeatureReads:
    """How K features are read from a raw residual x, and how far a change of them is written.

        measure      a                                   a change of f by δ adds to x
        product      ⟨read, x⟩ + bias                    δ · w
        cosine       ⟨read, x⟩ / ‖x‖ + bias              δ · ‖x‖ · write_scale · w
        centred      ⟨read, x⟩ / (σ(x) + 1e-5) + bias    δ · σ(x) · write_scale · w

    f = a if a > threshold else 0, and w is the feature's row of `writes`; σ is the unbiased
    standard deviation of x over its channels, and rows that are read `centred` sum to 0. Scales of
    the SAE are folded into `read`, `bias` and `write_scale`, which is 1 for a product.

    `read` `[K, d_in]`, `bias` `[K]`, `threshold` `[K]`, float32; −∞ where activations have signs.
    Where features compete the others must be looked at too (`steer.artefacts.sae.encoders`).
    """

    read: Float[Tensor, "K d_in"]
    bias: Float[Tensor, " K"]
    threshold: Float[Tensor, " K"]
    measure: Measure = "product"
    write_scale: float = 1.0
