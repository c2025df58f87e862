"""Lenses: for each layer a map to what the last block would give, kept as an artefact.

What goes into a decoder block is made into what the last block's output would have been, before the
final norm and the output matrix. A tuned lens (2303.08112) learns x + W x + b for it; a Jacobian
lens takes J x, J being the mean derivative of the last block's output. That output needs no map.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import Card, canonical_bytes, parse_canonical
from steer.errors import FileFormatError, IncompatibleArtefact, Unsupported
from steer.model import ModelInfo
from steer.spec import Site

LensMethod: TypeAlias = Literal["tuned", "jacobian"]


class LensMap(NamedTuple):
    """What one layer's states go through: x + W x + b, or, without a bias, the matrix alone.

    `weight` is `[d_model, d_model]`, `bias` `[d_model]`.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def method(self) -> LensMethod:
        return "jacobian" if self.bias is None else "tuned"

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As files name them."""
        if self.bias is None:
            return {"jacobian": self.weight}
        return {"weight": self.weight, "bias": self.bias}


@dataclass(frozen=True, eq=False)
class Lens:
    """A map for the input of each decoder block: W and b of a tuned lens, or a Jacobian.

    Guarantees: one method, one width, finite, of float32, float16 or bfloat16. A tuned lens has the
    blocks from 0 on without a gap; a Jacobian lens may have some alone. Where the last block is not
    among them, the card's `depth` says how many blocks the model has.
    The numbers stay in the type they came in (a lens is the largest artefact by far), and are
    computed with in float32.
    """

    translators: Mapping[int, LensMap]
    card: Card

    @staticmethod
    def of(translators: Mapping[int, tuple[Tensor, Tensor]], **card: Any) -> Lens:
        """A checked tuned lens, by the block whose input is read; `card` holds any field of `Card`.

        Raises `FileFormatError`.
        """
        if not translators or sorted(translators) != list(range(len(translators))):
            raise FileFormatError(
                "a tuned lens has a translator for each block from 0 on; got the blocks "
                f"{sorted(translators)[:10]}",
                code="unknown_layout",
            )
        width = translators[0][1].numel()
        for layer, (weight, bias) in translators.items():
            _check(f"translator {layer}", width, weight, bias)
        return _described(
            {n: LensMap(w.contiguous(), b.contiguous()) for n, (w, b) in translators.items()}, card
        )

    @staticmethod
    def of_jacobians(
        jacobians: Mapping[int, Tensor], *, depth: int | None = None, **card: Any
    ) -> Lens:
        """A checked Jacobian lens; J `[d_model, d_model]` by the block whose *input* it reads: the
        output of block l is the input of block l + 1. `depth` is how many blocks the model has;
        without it the last one is among `jacobians`.

        Raises `FileFormatError`.
        """
        if not jacobians or min(jacobians) < 0:
            raise FileFormatError(
                "a Jacobian lens has a matrix for at least one block, numbered from 0; got the "
                f"blocks {sorted(jacobians)[:10]}",
                code="unknown_layout",
            )
        first = jacobians[min(jacobians)]
        width = first.shape[-1] if first.ndim else 0
        for layer, matrix in jacobians.items():
            _check(f"the Jacobian of block {layer}'s input", width, matrix)
        least = max(jacobians) + 1
        if depth is not None and depth < least:
            raise FileFormatError(
                f"a lens with a map for block {least - 1} is for a model of at least {least} "
                f"blocks, not of {depth}",
                code="invalid_card",
            )
        # Said only where the maps do not say it, so that a whole lens is written as ever.
        described = {**card, "depth": depth if depth != least else None}
        return _described({n: LensMap(one.contiguous()) for n, one in jacobians.items()}, described)

    @cached_property
    def sha256(self) -> str:
        """The identity of the lens: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def method(self) -> LensMethod:
        return next(iter(self.translators.values())).method

    def to_bytes(self) -> bytes:
        """The canonical file: `layers.N.weight` and `layers.N.bias`, or `layers.N.jacobian`, and
        the card."""
        tensors = {
            f"layers.{layer}.{name}": tensor
            for layer, one in self.translators.items()
            for name, tensor in one.tensors.items()
        }
        return canonical_bytes(tensors, self.card)

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> Lens:
        tensors, card = parse_canonical(data, name)
        parts = {}
        for n in card.layers:
            key = f"layers.{n}"
            if f"{key}.jacobian" in tensors:
                parts[n] = LensMap(tensors[f"{key}.jacobian"])
            else:
                parts[n] = LensMap(tensors[f"{key}.weight"], tensors[f"{key}.bias"])
        return Lens(parts, card)

    @property
    def blocks(self) -> int:
        """How many decoder blocks the model has."""
        return self.card.depth or max(self.translators) + 1

    def check_fits(self, model: ModelInfo) -> None:
        """Raises `IncompatibleArtefact` unless `model` has this width and this many blocks."""
        if (self.card.width, self.blocks) != (model.d_model, model.n_layers):
            raise IncompatibleArtefact(
                f"the lens {self.card.name!r} is for {self.blocks} blocks of width "
                f"{self.card.width}; the model has {model.n_layers} of width {model.d_model}"
            )

    def check_reads(self, layer: int, site: Site) -> None:
        """Raises `Unsupported` for a site that is not between decoder blocks, and
        `IncompatibleArtefact` (`layer_not_in_lens`) for a layer that a Jacobian lens lacks."""
        if site not in ("resid_pre", "resid_post"):
            raise Unsupported(
                f"a lens reads between decoder blocks, not at {site!r}: use resid_post or "
                "resid_pre",
                code="unsupported_site",
                param="/site",
            )
        if not self.reads(layer, site):
            raise IncompatibleArtefact(
                f"the lens {self.card.name!r} has no map for {site} of layer {layer}: it reads the "
                f"outputs of the layers {self.output_layers}, and of the last, {self.blocks - 1}",
                code="layer_not_in_lens",
                param="/layers",
            )

    def reads(self, layer: int, site: Site) -> bool:
        """Whether it has the map for states there, or they need none."""
        return not self.translates(layer, site) or _block(layer, site) in self.translators

    def translator(self, layer: int, site: Site) -> LensMap | None:
        """The map in float32 for states at a block's resid_pre or resid_post; None for those of the
        last block, which need none. Raises as `check_reads` does."""
        self.check_reads(layer, site)
        if not self.translates(layer, site):
            return None
        weight, bias = self.translators[_block(layer, site)]
        return LensMap(weight.to(torch.float32), None if bias is None else bias.to(torch.float32))

    @property
    def output_layers(self) -> list[int]:
        """The layers whose outputs it has a map for."""
        return [block - 1 for block in sorted(self.translators) if block]

    def translates(self, layer: int, site: Site) -> bool:
        """Whether it does anything to states there: those after the last block need nothing."""
        return _block(layer, site) != self.blocks

    def translated(
        self, states: Float[Tensor, "N d_model"], layer: int, site: Site
    ) -> Float[Tensor, "N d_model"]:
        """What `states` there would become after the last block; those of the last block are
        returned unchanged. Raises as `translator` does."""
        found = self.translator(layer, site)
        return states if found is None else translate(states, *found)

    def pulled_back(
        self, rows: Float[Tensor, "N d_model"], layer: int, site: Site
    ) -> Float[Tensor, "N d_model"]:
        """What to multiply states there with, to have the product of `rows` with what the map makes
        of them, its bias left out: rows + rows W, or rows J. Raises as `translator` does."""
        found = self.translator(layer, site)
        if found is None:
            return rows
        mapped = rows @ found.weight
        return mapped if found.bias is None else rows + mapped


def translate(
    states: Float[Tensor, "N d_model"],
    weight: Float[Tensor, "d_model d_model"],
    bias: Float[Tensor, " d_model"] | None = None,
) -> Float[Tensor, "N d_model"]:
    """x + W x + b in float32; without b, W x alone."""
    x = states.to(torch.float32)
    mapped = torch.nn.functional.linear(x, weight, bias)
    return mapped if bias is None else x + mapped


def _block(layer: int, site: Site) -> int:
    """The block that states there go into: a block's output is the next one's input."""
    return layer if site == "resid_pre" else layer + 1


def _described(maps: Mapping[int, LensMap], card: Mapping[str, Any]) -> Lens:
    layers = tuple(sorted(maps))
    width = len(maps[layers[0]].weight)
    fields = {"kind": "lens", "site": "resid_pre", "width": width, "layers": layers, **card}
    return Lens({n: maps[n] for n in layers}, Card(**fields))


def _check(what: str, width: int, weight: Tensor, bias: Tensor | None = None) -> None:
    wrong = bias is not None and bias.shape != (width,)
    if weight.shape != (width, width) or wrong or width == 0:
        beside = "" if bias is None else f" and bias {list(bias.shape)}"
        wanted = f"[{width}, {width}]" + ("" if bias is None else f" and [{width}]")
        raise FileFormatError(f"{what}: weight {list(weight.shape)}{beside} must be {wanted}")
    for part in (weight, bias):
        if part is None:
            continue
        if part.dtype not in (torch.float32, torch.float16, torch.bfloat16):
            raise FileFormatError(f"{what} is of type {part.dtype}, not a small float")
        # The extremes say it too, without a copy of the largest tensors there are.
        if not all(bool(end.isfinite()) for end in part.aminmax()):
            raise FileFormatError(f"{what} contains NaN or Inf", code="not_finite")
