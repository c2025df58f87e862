"""Tuned lenses (2303.08112): an affine translator for each layer, kept as an artefact.

A translator reads the input of a decoder block and says what the last block's output would have
been: x + W x + b, before the final norm and the output matrix. The last block's output needs none.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import Card, canonical_bytes, parse_canonical
from steer.errors import FileFormatError, IncompatibleArtefact, Unsupported
from steer.model import ModelInfo
from steer.spec import Site


@dataclass(frozen=True, eq=False)
class Lens:
    """W `[d_model, d_model]` and b `[d_model]` for the input of each decoder block.

    Guarantees: blocks from 0 without a gap, one width, finite, of float32, float16 or bfloat16. The
    numbers stay in the type they came in (a lens is the largest artefact by far), and are computed
    with in float32.
    """

    translators: Mapping[int, tuple[Tensor, Tensor]]
    card: Card

    @staticmethod
    def of(translators: Mapping[int, tuple[Tensor, Tensor]], **card: Any) -> Lens:
        """A checked lens; `card` holds any field of `Card`. Raises `FileFormatError`."""
        if not translators or sorted(translators) != list(range(len(translators))):
            raise FileFormatError(
                "a tuned lens has a translator for each block from 0 on; got the blocks "
                f"{sorted(translators)[:10]}",
                code="unknown_layout",
            )
        width = translators[0][1].numel()
        for layer, (weight, bias) in translators.items():
            _check(layer, weight, bias, width)
        layers = tuple(sorted(translators))
        fields = {"kind": "lens", "site": "resid_pre", "width": width, "layers": layers, **card}
        parts = {
            n: (translators[n][0].contiguous(), translators[n][1].contiguous()) for n in layers
        }
        return Lens(parts, Card(**fields))

    @cached_property
    def sha256(self) -> str:
        """The identity of the lens: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical file: `layers.N.weight`, `layers.N.bias` and the card."""
        tensors = {}
        for layer, (weight, bias) in self.translators.items():
            tensors[f"layers.{layer}.weight"] = weight
            tensors[f"layers.{layer}.bias"] = bias
        return canonical_bytes(tensors, self.card)

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> Lens:
        tensors, card = parse_canonical(data, name)
        parts = {
            n: (tensors[f"layers.{n}.weight"], tensors[f"layers.{n}.bias"]) for n in card.layers
        }
        return Lens(parts, card)

    def check_fits(self, model: ModelInfo) -> None:
        """Raises `IncompatibleArtefact` unless `model` has this width and this many blocks."""
        if (self.card.width, len(self.translators)) != (model.d_model, model.n_layers):
            raise IncompatibleArtefact(
                f"the lens {self.card.name!r} is for {len(self.translators)} blocks of width "
                f"{self.card.width}; the model has {model.n_layers} of width {model.d_model}"
            )

    def translator(self, layer: int, site: Site) -> tuple[Tensor, Tensor] | None:
        """W and b in float32 for states at a block's resid_pre or resid_post; None for those of the
        last block, which need none.

        A block's output is the next one's input, so its translator is the next one's. Raises
        `Unsupported` for other sites.
        """
        if site not in ("resid_pre", "resid_post"):
            raise Unsupported(
                f"a tuned lens reads between decoder blocks, not at {site!r}: use resid_post or "
                "resid_pre",
                code="unsupported_site",
                param="/site",
            )
        if not self.translates(layer, site):
            return None
        weight, bias = self.translators[layer if site == "resid_pre" else layer + 1]
        return weight.to(torch.float32), bias.to(torch.float32)

    def translates(self, layer: int, site: Site) -> bool:
        """Whether it does anything to states there: those after the last block need nothing."""
        return (layer if site == "resid_pre" else layer + 1) != len(self.translators)

    def translated(
        self, states: Float[Tensor, "N d_model"], layer: int, site: Site
    ) -> Float[Tensor, "N d_model"]:
        """What `states` there would become after the last block; those of the last block are
        returned unchanged. Raises as `translator` does."""
        found = self.translator(layer, site)
        return states if found is None else translate(states, *found)


def translate(
    states: Float[Tensor, "N d_model"],
    weight: Float[Tensor, "d_model d_model"],
    bias: Float[Tensor, " d_model"],
) -> Float[Tensor, "N d_model"]:
    """x + W x + b in float32."""
    x = states.to(torch.float32)
    return x + torch.nn.functional.linear(x, weight, bias)


def _check(layer: int, weight: Tensor, bias: Tensor, width: int) -> None:
    if weight.shape != (width, width) or bias.shape != (width,) or width == 0:
        raise FileFormatError(
            f"translator {layer}: weight {list(weight.shape)} and bias {list(bias.shape)} must be "
            f"[{width}, {width}] and [{width}]"
        )
    for part in (weight, bias):
        if part.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise FileFormatError(f"translator {layer} is of type {part.dtype}, not a small float")
        # The extremes say it too, without a copy of the largest tensors there are.
        if not all(bool(end.isfinite()) for end in part.aminmax()):
            raise FileFormatError(f"translator {layer} contains NaN or Inf", code="not_finite")
