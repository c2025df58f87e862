"""Names as long vectors of ±1 (vector-symbolic codes, as in 2509.25045).

Random codes are nearly at right angles. Binding two multiplies them channel by channel, and binding
the product with one again gives the other; a bundle is the sign of a sum, and is like each of its
parts. So a text's pairs of role and filler are one code, of which a role asks its filler.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.concepts.form import DIMENSIONS


@dataclass(frozen=True)
class Codebook:
    """Codes of `dimensions` channels, drawn for each name by itself: a name's code does not depend
    on which others there are. All float32."""

    dimensions: int = DIMENSIONS
    seed: int = 0

    def code(self, kind: str, name: str) -> Float[Tensor, " dimensions"]:
        """The code of `name`; a role and a filler (`kind`) of one name have codes of their own."""
        key = f"{self.seed}\x00{kind}\x00{name}".encode()
        number = int.from_bytes(hashlib.sha256(key).digest()[:8], "little") >> 1
        drawn = torch.Generator().manual_seed(number)
        return torch.randint(0, 2, (self.dimensions,), generator=drawn).float() * 2 - 1

    def codes(self, kind: str, names: Sequence[str]) -> Float[Tensor, "names dimensions"]:
        return torch.stack([self.code(kind, name) for name in names])

    def bundle(self, pairs: Mapping[str, str]) -> Float[Tensor, " dimensions"]:
        """The code of a text with these pairs, the role first. Where as many say + as −, a channel
        is that of a code of its own, drawn for these pairs: so that no pair is favoured."""
        parts = [
            self.code("role", role) * self.code("filler", filler) for role, filler in pairs.items()
        ]
        total = torch.stack(parts).sum(0)
        ties = self.code("ties", "\x00".join(f"{r}\x01{f}" for r, f in sorted(pairs.items())))
        return torch.where(total == 0, ties, total.sign())

    def filler_cosines(
        self, bundled: Float[Tensor, "N dimensions"], role: str, fillers: Sequence[str]
    ) -> Float[Tensor, "N fillers"]:
        """How like each of `fillers` is what `role` unbinds from each of `bundled`."""
        asked = bundled * self.code("role", role)
        lengths = asked.norm(dim=-1, keepdim=True).clamp_min(1e-30) * self.dimensions**0.5
        found: Tensor = asked @ self.codes("filler", fillers).T / lengths
        return found
