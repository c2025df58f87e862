"""Control vectors, low-rank adapters and the cards that describe them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, Field, JsonValue
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from steer.artefacts.adapter_parts import (
    AdapterPart,
    EditRows,
    named_tensors,
    part_among,
    part_fault,
    part_of,
)
from steer.artefacts.calibration import Calibration
from steer.artefacts.concepts.form import ProbeForm
from steer.artefacts.detection import Detection
from steer.artefacts.kinds import ArtefactKind
from steer.artefacts.oracle_form import OracleForm
from steer.errors import FileFormatError, IncompatibleArtefact
from steer.spec import Site, Where


class LayerMeasure(BaseModel):
    """What was measured for one layer when a vector was fitted.

    `positive` and `negative` are the class means of the projection on the unit direction;
    `separation` is their distance in pooled standard deviations (d′); `residual_norm` is the mean
    norm of the states. `cap` is the bound on the projection that the vector was made for. All in
    units of the residual stream except `separation`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    separation: float | None = None
    positive: float | None = None
    negative: float | None = None
    residual_norm: float | None = None
    # Written only where there is one, so that older cards keep their hash.
    cap: float | None = Field(default=None, exclude_if=lambda value: value is None)


class Card(BaseModel):
    """What an artefact is, where it came from, and how it is meant to be used.

    The card travels inside the artefact's file and is part of its identity, save for `name`,
    which belongs to the registry.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str = ""
    kind: ArtefactKind = "vector"
    model: str | None = None
    width: int
    layers: tuple[int, ...]
    site: Site = "resid_post"
    # Where a transcoder writes what it reads at `site`; without one a card is written as before.
    write_site: Site | None = Field(default=None, exclude_if=lambda value: value is None)
    default_layers: tuple[int, ...] | None = None
    default_strength: float = 1.0
    default_where: Where | None = None
    description: str = ""
    licence: str = ""
    tags: tuple[str, ...] = ()
    provenance: dict[str, JsonValue] = Field(default_factory=dict)
    measures: dict[int, LayerMeasure] = Field(default_factory=dict)
    # Without one a card is written as before there were any, so that old files keep their hash.
    calibration: Calibration | None = Field(default=None, exclude_if=lambda value: value is None)
    detection: Detection | None = Field(default=None, exclude_if=lambda value: value is None)
    # How an oracle is asked; no other kind has one.
    oracle: OracleForm | None = Field(default=None, exclude_if=lambda value: value is None)
    # What a probe was taught; no other kind has one.
    probe: ProbeForm | None = Field(default=None, exclude_if=lambda value: value is None)
    # How many decoder blocks a lens's model has, where its own maps do not say it.
    depth: int | None = Field(default=None, ge=1, exclude_if=lambda value: value is None)

    @property
    def used_layers(self) -> tuple[int, ...]:
        """The layers an intervention acts on when it names none."""
        return self.default_layers or self.layers


@dataclass(frozen=True)
class ControlVector:
    """A direction per layer, float32 `[width]`, with its card.

    Guarantees: finite, non-zero, of one width, at least one layer.
    """

    directions: Mapping[int, Tensor]
    card: Card

    @staticmethod
    def of(directions: Mapping[int, Tensor], **card: Any) -> ControlVector:
        """A checked vector from rows of any float dtype; `card` holds any field of `Card`."""
        rows = {
            int(layer): row.detach().to(torch.float32, copy=True).cpu().contiguous()
            for layer, row in sorted(directions.items())
        }
        width = check_rows(rows.items())
        described = Card(**{"width": width, "layers": tuple(rows), **card})
        return ControlVector(rows, described)

    @staticmethod
    def owning(directions: Mapping[int, Tensor], **card: Any) -> ControlVector:
        """Like `of`, but rows that are float32 and alone in their memory are kept, not copied.

        Assumes: nobody else writes to them. For readers, which would hold every file twice.
        """
        rows = {int(layer): _own(row) for layer, row in sorted(directions.items())}
        width = check_rows(rows.items())
        return ControlVector(rows, Card(**{"width": width, "layers": tuple(rows), **card}))

    def __getitem__(self, layer: int) -> Tensor:
        try:
            return self.directions[layer]
        except KeyError:
            raise IncompatibleArtefact(
                f"the vector {self.card.name!r} has no direction for layer {layer}: "
                f"it has layers {sorted(self.directions)}",
                code="layer_not_in_vector",
            ) from None

    @cached_property
    def sha256(self) -> str:
        """The identity of the vector: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def to_bytes(self) -> bytes:
        """The canonical safetensors file: `layers.N` rows and the card without its name."""
        return canonical_bytes(
            {f"layers.{n}": row for n, row in self.directions.items()}, self.card
        )

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> ControlVector:
        """Reads a canonical file; foreign layouts are read by `steer.formats`."""
        tensors, card = parse_canonical(data, name)
        rows = {int(key.removeprefix("layers.")): row for key, row in tensors.items()}
        return ControlVector(dict(sorted(rows.items())), card)

    def renamed(self, name: str) -> ControlVector:
        return ControlVector(self.directions, self.card.model_copy(update={"name": name}))

    def on_layers(self, layers: Iterable[int]) -> ControlVector:
        """The same vector on some of its layers, its card cut down to them; a calibration stays
        where all its layers do. Raises `IncompatibleArtefact` for a layer that it has not."""
        chosen = tuple(sorted(set(layers)))
        rows = {layer: self[layer] for layer in chosen}
        defaults = tuple(layer for layer in self.card.default_layers or () if layer in rows)
        held = self.card.calibration
        changes = {
            "layers": chosen,
            "default_layers": defaults or None,
            "measures": {n: self.card.measures[n] for n in chosen if n in self.card.measures},
            "calibration": held if held is not None and set(held.layers) <= rows.keys() else None,
        }
        return ControlVector(rows, self.card.model_copy(update=changes))

    def __add__(self, other: ControlVector) -> ControlVector:
        return self._merged(other, lambda mine, theirs: mine + theirs)

    def __sub__(self, other: ControlVector) -> ControlVector:
        return self._merged(other, lambda mine, theirs: mine - theirs)

    def __mul__(self, factor: float) -> ControlVector:
        return self._mapped(lambda row: row * factor)

    __rmul__ = __mul__

    def __neg__(self) -> ControlVector:
        return self * -1.0

    def unit(self) -> ControlVector:
        """Every row scaled to length one."""
        return self._mapped(lambda row: row / row.norm())

    def cosine(self, other: ControlVector) -> dict[int, float]:
        """The cosine between the two vectors on each layer that both have."""
        return {
            layer: float(torch.cosine_similarity(row, other.directions[layer], dim=0))
            for layer, row in self.directions.items()
            if layer in other.directions
        }

    def _mapped(self, change: Callable[[Tensor], Tensor]) -> ControlVector:
        rows = {layer: change(row) for layer, row in self.directions.items()}
        return ControlVector.of(rows, **self._derived_card(rows))

    def _merged(
        self, other: ControlVector, change: Callable[[Tensor, Tensor], Tensor]
    ) -> ControlVector:
        shared = sorted(set(self.directions) & set(other.directions))
        if not shared or self.card.width != other.card.width or self.card.site != other.card.site:
            raise IncompatibleArtefact(
                "two vectors can be combined when they have the same width and site and share a "
                f"layer; got {self.card.width} at {self.card.site} on {list(self.directions)} and "
                f"{other.card.width} at {other.card.site} on {list(other.directions)}"
            )
        rows = {layer: change(self.directions[layer], other.directions[layer]) for layer in shared}
        return ControlVector.of(rows, **self._derived_card(rows))

    def _derived_card(self, rows: Mapping[int, Tensor]) -> dict[str, Any]:
        # Measures and default strength were taken of another direction and do not carry over.
        defaults = self.card.default_layers
        kept = tuple(layer for layer in defaults if layer in rows) if defaults else None
        return {
            "model": self.card.model,
            "site": self.card.site,
            "default_layers": kept or None,
            "default_where": self.card.default_where,
        }


@dataclass(frozen=True)
class LowRankAdapter:
    """A few rank-1 edits for each layer: a LoReFT intervention, or read and write rows as such."""

    parts: Mapping[int, AdapterPart]
    card: Card

    @staticmethod
    def of(
        parts: Mapping[int, AdapterPart | tuple[Tensor, Tensor, Tensor]], **card: Any
    ) -> LowRankAdapter:
        """A checked adapter of one form on all layers; three plain tensors are LoReFT's R, W, b."""
        copies: dict[int, AdapterPart] = {}
        for layer, given in sorted(parts.items()):
            part = part_of(given)
            fault = part_fault(part)
            if fault is not None:
                raise FileFormatError(f"layer {layer}: {fault}")
            tensors = named_tensors(part)
            if not all(bool(tensor.isfinite().all()) for tensor in tensors.values()):
                raise FileFormatError(f"layer {layer} contains NaN or Inf", code="not_finite")
            copies[layer] = type(part)(**{name: _copy(one) for name, one in tensors.items()})
        widths = {part[0].shape[1] for part in copies.values()}
        if len(widths) != 1:
            raise FileFormatError(f"an adapter has one width on all layers; got {sorted(widths)}")
        forms = sorted({tuple(named_tensors(part)) for part in copies.values()})
        if len(forms) != 1:
            raise FileFormatError(f"an adapter has one form on all layers; got {forms}")
        fields = {"kind": "low_rank", "width": widths.pop(), "layers": tuple(copies), **card}
        return LowRankAdapter(copies, Card(**fields))

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def edits(self, layer: int) -> EditRows:
        """The rank-1 edits on `layer`, whatever the form of the file."""
        return self.parts[layer].edits

    def to_bytes(self) -> bytes:
        """The canonical file: `layers.N.rotation`, `.weight`, `.bias`, or `layers.N.read`,
        `.write`, `.bias` and, where there is one, `.threshold`; and the card."""
        return canonical_bytes(
            {
                f"layers.{layer}.{name}": tensor
                for layer, part in self.parts.items()
                for name, tensor in named_tensors(part).items()
            },
            self.card,
        )

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> LowRankAdapter:
        tensors, card = parse_canonical(data, name)
        parts = {layer: part_among(tensors, layer) for layer in card.layers}
        return LowRankAdapter(parts, card)


def _copy(tensor: Tensor) -> Tensor:
    """Float32 and contiguous, as safetensors wants it."""
    return tensor.float().contiguous().clone()


def _own(row: Tensor) -> Tensor:
    alone = row.is_contiguous() and row.untyped_storage().nbytes() == 4 * row.numel()
    if row.dtype == torch.float32 and row.device.type == "cpu" and alone:
        return row.detach()
    return row.detach().to(torch.float32, copy=True).cpu().contiguous()


_FLOAT32 = torch.finfo(torch.float32)
_SHORTEST, _LONGEST = _FLOAT32.tiny**0.5, _FLOAT32.max**0.5
"""Outside of them the square of a norm under- or overflows: the direction would be lost."""


def check_rows(rows: Iterable[tuple[int, Tensor]], *, source: str = "the vector") -> int:
    """The common width of `rows`; raises `FileFormatError` unless they make a usable vector."""
    width: int | None = None
    for layer, row in rows:
        if row.ndim != 1 or row.numel() == 0:
            raise FileFormatError(
                f"{source}: layer {layer} has shape {list(row.shape)}; a direction is one row [d]"
            )
        if width is not None and row.numel() != width:
            raise FileFormatError(
                f"{source}: layer {layer} has width {row.numel()}, the layers before have {width}",
                code="mixed_widths",
            )
        if not bool(torch.isfinite(row).all()):
            raise FileFormatError(f"{source}: layer {layer} contains NaN or Inf", code="not_finite")
        length = float(row.double().norm())
        if not bool(row.any()):
            raise FileFormatError(
                f"{source}: layer {layer} is all zeros, which steers nothing: leave the layer out",
                code="zero_vector",
            )
        if not _SHORTEST <= length <= _LONGEST:
            raise FileFormatError(
                f"{source}: layer {layer} has the norm {length:.3g}, and float32 computes norms "
                f"from {_SHORTEST:.3g} to {_LONGEST:.3g}: scale the row, and steer with another "
                "strength",
                code="norm_out_of_range",
            )
        width = row.numel()
    if width is None:
        raise FileFormatError(f"{source} has no layers")
    return width


def canonical_bytes(tensors: Mapping[str, Tensor], card: Card) -> bytes:
    """One of our own files: safetensors, with the card but its name under the key `steer`."""
    # One metadata key: safetensors writes several in no fixed order, and the hash must not depend
    # on it.
    text = json.dumps(card.model_dump(mode="json", by_alias=True, exclude={"name"}), sort_keys=True)
    return bytes(save_safetensors(dict(tensors), metadata={"steer": text}))


def parse_canonical(data: bytes, name: str) -> tuple[dict[str, Tensor], Card]:
    """Tensors and card of what `canonical_bytes` wrote; `steer.formats` reads files of others."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    card = Card.model_validate_json(header["__metadata__"]["steer"])
    return load_safetensors(data), card.model_copy(update={"name": name})
