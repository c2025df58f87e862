"""SAE-refined vectors: the attribute as the SAE sees it, decoded (Words in Motion, 2406.11624).

    s = encode(h);   c = first component, or mean, of s⁺ − s⁻;   v = decode(c) without the bias

What the SAE cannot express is left out of the vector, and with it some of the noise. Memory per
layer: what the inner method holds in d_sae numbers per row: d_sae for a difference of means,
min(pairs, 3·d_sae)·d_sae for PCA.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import torch
from torch import Tensor

from steer.artefacts.sae.base import SAE
from steer.errors import Unsupported
from steer.fit.methods.diffmean import DifferenceOfMeans
from steer.fit.methods.method import MakeMethod
from steer.fit.methods.pca import UncentredPCA

REFINABLE: Mapping[str, MakeMethod] = MappingProxyType(
    {"diffmean": DifferenceOfMeans, "pca": UncentredPCA}
)


class SAERefined:
    """A method over latents. Its direction lives where the SAE reads.

    Guarantees: sign and length come from the states, not from the latents: the direction points to
    the positive class and is as long as the class gap along it.
    """

    def __init__(self, sae: SAE, method: str) -> None:
        if method not in REFINABLE:
            raise Unsupported(
                f"the method {method!r} cannot be refined by an SAE: use one of "
                f"{', '.join(REFINABLE)}",
                code="unsupported_method",
            )
        if sae.is_transcoder:
            raise Unsupported(
                f"the SAE {sae.card.name!r} is a transcoder, whose features write at "
                f"{sae.write_point.site} and not where they are read: refine with an SAE of one "
                "site",
                code="two_sites",
            )
        self._sae = sae
        self._latents = REFINABLE[method](sae.d_sae)
        self._gap = DifferenceOfMeans(sae.d_in)

    def add(self, positive: Tensor, negative: Tensor) -> None:
        self._latents.add(self._sae.encode(positive), self._sae.encode(negative))
        self._gap.add(positive, negative)

    def direction(self) -> Tensor:
        """Float32 `[d]`; zeros where the latents of both classes are alike."""
        latents = self._latents.direction()
        # The difference of two decodings: linear, so that neither bias nor shift is left in it.
        # An SAE that scales every token by itself has no such map, and `decode` says so.
        decoded = self._sae.decode(latents) - self._sae.decode(torch.zeros_like(latents))
        if not bool(decoded.any()):
            return torch.zeros(self._sae.d_in)
        unit: Tensor = decoded.double() / decoded.double().norm()
        direction: Tensor = (unit * (unit @ self._gap.direction().double())).float()
        return direction

    @property
    def held_floats(self) -> int:
        """Numbers in memory now."""
        return self._latents.held_floats + self._gap.held_floats
