"""What an SAE does to a token before it encodes it, under SAELens' names.

`none` does nothing. `expected_average_only_in` is a static scale that belongs to the weights: a
scale that is known is folded into them when the SAE is loaded. The other two measure every token.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

from torch import Tensor

from steer.errors import Unsupported

Normalisation: TypeAlias = Literal[
    "none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"
]
NORMALISATIONS: tuple[Normalisation, ...] = get_args(Normalisation)
PER_TOKEN: tuple[Normalisation, ...] = ("layer_norm", "constant_norm_rescale")

_EPSILON = 1e-5


def check_normalisation(name: str) -> Normalisation:
    """`name`, or `Unsupported` (`unsupported_normalisation`)."""
    for known in NORMALISATIONS:
        if name == known:
            return known
    raise Unsupported(
        f"normalize_activations {name!r} is not supported: use one of {', '.join(NORMALISATIONS)}"
        + (", or fold the whitening into the weights" if name == "covariance_whitening" else ""),
        code="unsupported_normalisation",
    )


@dataclass(frozen=True)
class Scaling:
    """Token by token: normalised = (x − shift) / divisor; output = y · factor + shift."""

    shift: Tensor | float = 0.0
    divisor: Tensor | float = 1.0
    factor: Tensor | float = 1.0

    def apply(self, x: Tensor) -> Tensor:
        return (x - self.shift) / self.divisor

    def undo(self, y: Tensor) -> Tensor:
        return y * self.factor + self.shift


def scaling(name: Normalisation, x: Tensor) -> Scaling:
    """The scaling of each token of float `x` `[..., d_in]`; its parts are `[..., 1]`.

    `layer_norm` divides by the unbiased standard deviation + 1e-5 but multiplies by the standard
    deviation alone on the way out, as SAELens does.
    """
    if name == "layer_norm":
        deviation = x.std(dim=-1, keepdim=True)
        return Scaling(x.mean(dim=-1, keepdim=True), deviation + _EPSILON, deviation)
    if name == "constant_norm_rescale":
        length = x.norm(dim=-1, keepdim=True) / x.shape[-1] ** 0.5
        return Scaling(0.0, length, length)
    return Scaling()
