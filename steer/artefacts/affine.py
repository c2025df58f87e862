"""Affine maps of single channels: what Linear-AcT fits (2410.23054), kept as an artefact."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import Card, canonical_bytes, parse_canonical
from steer.errors import FileFormatError


class Channels(NamedTuple):
    """scale ⊙ x + shift, on the channels in which lower ≤ x ≤ upper; on all where there are no
    bounds. Infinite bounds do not bind."""

    scale: Float[Tensor, " d"]
    shift: Float[Tensor, " d"]
    lower: Float[Tensor, " d"] | None = None
    upper: Float[Tensor, " d"] | None = None

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that there are, called as in a file."""
        return {name: tensor for name, tensor in self._asdict().items() if tensor is not None}


@dataclass(frozen=True, eq=False)
class AffineMap:
    """A map of each channel by itself, for each layer.

    Guarantees: at least one layer, float32, one width; scale and shift are finite, bounds come in
    pairs and are not NaN.
    """

    channels: Mapping[int, Channels]
    card: Card

    @staticmethod
    def of(channels: Mapping[int, Channels], **card: Any) -> AffineMap:
        """A checked map; `card` holds any field of `Card`. Raises `FileFormatError`."""
        copies = {layer: _copied(layer, one) for layer, one in sorted(channels.items())}
        widths = sorted({len(one.scale) for one in copies.values()})
        if len(widths) != 1:
            raise FileFormatError(f"an affine map has one width on all layers; got {widths}")
        fields = {"kind": "affine", "width": widths[0], "layers": tuple(copies), **card}
        return AffineMap(copies, Card(**fields))

    @cached_property
    def sha256(self) -> str:
        """The identity of the map: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical file: `layers.N.scale`, `.shift`, with bounds `.lower` and `.upper`; and
        the card."""
        return canonical_bytes(
            {
                f"layers.{layer}.{name}": tensor
                for layer, one in self.channels.items()
                for name, tensor in one.tensors.items()
            },
            self.card,
        )

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> AffineMap:
        tensors, card = parse_canonical(data, name)
        rows: dict[int, dict[str, Tensor]] = {layer: {} for layer in card.layers}
        for key, tensor in tensors.items():
            _, layer, part = key.split(".")
            rows[int(layer)][part] = tensor
        return AffineMap({layer: Channels(**named) for layer, named in rows.items()}, card)


def _copied(layer: int, one: Channels) -> Channels:
    tensors = {name: tensor.float().contiguous().clone() for name, tensor in one.tensors.items()}
    shapes = {name: list(tensor.shape) for name, tensor in tensors.items()}
    if len(one.scale.shape) != 1 or any(shape != shapes["scale"] for shape in shapes.values()):
        told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise FileFormatError(f"layer {layer}: {told}: each is one row [d]")
    if (one.lower is None) != (one.upper is None):
        raise FileFormatError(f"layer {layer} has one bound: give 'lower' and 'upper', or neither")
    finite = all(bool(tensors[name].isfinite().all()) for name in ("scale", "shift"))
    if not finite or any(bool(tensor.isnan().any()) for tensor in tensors.values()):
        raise FileFormatError(f"layer {layer} contains NaN or Inf", code="not_finite")
    return Channels(**tensors)


def channel_rows(one: Channels, strength: float) -> Float[Tensor, "4 d"]:
    """`one` as a block's `channels`: x + λ((scale ⊙ x + shift) − x) inside the bounds."""
    unbound = torch.full_like(one.scale, torch.inf)
    lower = -unbound if one.lower is None else one.lower
    upper = unbound if one.upper is None else one.upper
    return torch.stack([strength * (one.scale - 1.0), strength * one.shift, lower, upper])
