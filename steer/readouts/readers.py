"""What reads at one hook point: from the states of T tokens to a few float32 numbers for each.

A reader is made once, when a spec is compiled; its tensors lie on the CPU, and `Instruments` holds
copies on the device that states are on. Readers with equal `key` do the same, so that requests
share what they read.
"""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TypeAlias, TypeVar

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.lens import Lens, translate
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.edits import relative_sizes
from steer.model import HookPoint
from steer.readouts import measures
from steer.readouts.encoding import encoder_bytes, encoder_on

Unembed: TypeAlias = Callable[[Tensor], Tensor | None]
"""States after the last block `[T, d_model]` to float32 logits `[T, vocab]`; None on a worker that
takes part in making them and gets none."""
Held = TypeVar("Held")

_NUMBERS_AT_ONCE = 1 << 24
"""Activations or logits that are computed at a time: 64 MiB of float32."""
_KEPT_BYTES = 4 << 30
"""What copies of artefacts on a device may take."""


class Instruments:
    """What a process reads with: copies of readers' tensors on `device`, the least recently used
    given up over `kept_bytes`, and the model's way from states to logits.

    Assumes: one thread.
    """

    def __init__(
        self,
        device: torch.device,
        unembed: Unembed | None = None,
        *,
        vocab_size: int = 0,
        kept_bytes: int = _KEPT_BYTES,
    ) -> None:
        self.device, self.unembed, self.vocab_size = device, unembed, vocab_size
        self.kept_bytes, self._bytes = kept_bytes, 0
        self._held: OrderedDict[str, tuple[object, int]] = OrderedDict()

    def on_device(self, key: str, size: int, move: Callable[[torch.device], Held]) -> Held:
        """What `move` makes, once for each `key`; it takes `size` bytes."""
        found = self._held.get(key)
        if found is None:
            found = move(self.device), size
            self._held[key] = found
            self._bytes += size
            while self._bytes > self.kept_bytes and len(self._held) > 1:
                self._bytes -= self._held.popitem(last=False)[1][1]
        else:
            self._held.move_to_end(key)
        return found[0]  # type: ignore[return-value]


@dataclass(frozen=True)
class NormReader:
    """‖x‖."""

    point: HookPoint
    field = "norms"
    width = 1

    @property
    def key(self) -> str:
        return f"norm {self.point}"

    def read(self, before: Tensor, after: Tensor, tools: Instruments) -> Tensor:  # noqa: ARG002
        return measures.norms(after)[:, None]


@dataclass(frozen=True)
class SizeReader:
    """‖Δx‖/‖x‖ of the edits."""

    point: HookPoint
    field = "relative_size"
    width = 1

    @property
    def key(self) -> str:
        return f"size {self.point}"

    def read(self, before: Tensor, after: Tensor, tools: Instruments) -> Tensor:  # noqa: ARG002
        return relative_sizes(before, after)[:, None]


@dataclass(frozen=True, eq=False)
class ProjectionReader:
    """⟨x, v̂⟩ along `units` `[k, d]`, of the vectors called `names`."""

    point: HookPoint
    units: Float[Tensor, "k d"]
    names: tuple[str, ...]
    field = "projections"

    @property
    def width(self) -> int:
        return len(self.units)

    @cached_property
    def key(self) -> str:
        digest = hashlib.sha256(self.units.numpy().tobytes()).hexdigest()
        return f"projections {self.point} {digest}"

    def read(self, before: Tensor, after: Tensor, tools: Instruments) -> Tensor:  # noqa: ARG002
        units = tools.on_device(self.key, self.units.nbytes, self.units.to)
        return measures.projections(after, units)


@dataclass(frozen=True, eq=False)
class DetectorReader:
    """⟨w, x⟩ + b of the detector called `name`, `weights` `[d]`."""

    point: HookPoint
    weights: Float[Tensor, " d"]
    bias: float
    name: str
    field = "detectors"
    width = 1

    @cached_property
    def key(self) -> str:
        digest = hashlib.sha256(self.weights.numpy().tobytes()).hexdigest()
        return f"detector {self.point} {digest} {self.bias!r}"

    def read(self, before: Tensor, after: Tensor, tools: Instruments) -> Tensor:  # noqa: ARG002
        weights = tools.on_device(self.key, self.weights.nbytes, self.weights.to)
        return measures.affine_scores(after, weights, self.bias)[:, None]


@dataclass(frozen=True, eq=False)
class FeatureReader:
    """Activations of the `features` of an SAE, called `name`. `sae` has these rows alone, where a
    feature can be read by itself; otherwise it is whole, and all of them are computed."""

    point: HookPoint
    sae: SAE
    features: tuple[int, ...]
    name: str
    whole: bool
    labels: Mapping[int, FeatureLabel] = field(default_factory=dict)
    field = "features"

    @property
    def width(self) -> int:
        return len(self.features)

    @cached_property
    def key(self) -> str:
        return f"features {self.sae.sha256} {self.features}"

    def read(self, before: Tensor, after: Tensor, tools: Instruments) -> Tensor:  # noqa: ARG002
        activations = _encoded(self.sae, after, tools)
        if not self.whole:
            return activations
        return activations[:, torch.tensor(self.features, device=activations.device)]


@dataclass(frozen=True, eq=False)
class TopFeaturesReader:
    """The `top` largest activations of an SAE, called `name`: activations, then features."""

    point: HookPoint
    sae: SAE
    top: int
    name: str
    field = "features"

    @property
    def width(self) -> int:
        return 2 * self.top

    @cached_property
    def key(self) -> str:
        return f"top {self.sae.sha256} {self.top}"

    def read(self, before: Tensor, after: Tensor, tools: Instruments) -> Tensor:  # noqa: ARG002
        rows = max(1, _NUMBERS_AT_ONCE // self.sae.d_sae)
        parts = [
            measures.ranked(_encoded(self.sae, part, tools), self.top)
            for part in torch.split(after, rows)
        ]
        return torch.cat([_side_by_side(part) for part in parts])


@dataclass(frozen=True, eq=False)
class LensReader:
    """What a layer would say next, through a `lens` where there is one: probabilities of the
    `top` likeliest tokens, these tokens, and the entropy. The model's own head makes the logits,
    so that it is read when the pass is over."""

    point: HookPoint
    top: int
    lens: Lens | None = None
    name: str | None = None
    field = "lens"

    @property
    def width(self) -> int:
        return 2 * self.top + 1

    @cached_property
    def key(self) -> str:
        return f"lens {self.point} {self.top} {self.lens.sha256 if self.lens else None}"

    def states(self, after: Float[Tensor, "T d"], tools: Instruments) -> Float[Tensor, "T d"]:
        """The states as they would be after the last block."""
        lens, point = self.lens, self.point
        if lens is None or not lens.translates(point.layer, point.site):
            return after

        def moved(device: torch.device) -> list[Tensor]:
            found = lens.translator(point.layer, point.site) or ()
            return [part.to(device) for part in found if part is not None]

        size = 4 * lens.card.width * (lens.card.width + 1)
        return translate(after, *tools.on_device(f"lens {lens.sha256} {point}", size, moved))


def read_lenses(
    readers: Sequence[LensReader], states: Sequence[Float[Tensor, "T d"]], tools: Instruments
) -> list[Float[Tensor, "T n"]]:
    """The numbers of what each reader's `states` gave, read by the head in one go, a bounded number
    of logits at a time; NaN where there are no logits."""
    assert tools.unembed is not None, "checked when the spec was compiled"
    top = max(reader.top for reader in readers)
    rows = max(1, _NUMBERS_AT_ONCE // max(tools.vocab_size, 1))
    found = []
    for part in torch.split(torch.cat([one.float() for one in states]), rows):
        logits = tools.unembed(part)
        if logits is not None:
            best, entropy = measures.predicted(logits, top)
            found.append((*best, entropy[:, None]))
    if not found:
        return [
            mine.new_full((len(mine), reader.width), torch.nan)
            for reader, mine in zip(readers, states, strict=True)
        ]
    chances, tokens, entropy = (torch.cat(parts) for parts in zip(*found, strict=True))
    numbers, start = [], 0
    for reader, mine in zip(readers, states, strict=True):
        place = slice(start, start + len(mine))
        mine_best = measures.Ranked(chances[place, : reader.top], tokens[place, : reader.top])
        numbers.append(torch.cat([_side_by_side(mine_best), entropy[place]], dim=1))
        start = place.stop
    return numbers


Reader: TypeAlias = (
    NormReader
    | SizeReader
    | ProjectionReader
    | DetectorReader
    | FeatureReader
    | TopFeaturesReader
    | LensReader
)


def _encoded(sae: SAE, x: Tensor, tools: Instruments) -> Tensor:
    size = encoder_bytes(sae)
    if sae.pursuit is not None or size > tools.kept_bytes:
        return sae.encode(x.cpu()).to(x.device)  # its rows stay where they are
    near = tools.on_device(f"sae {sae.sha256}", size, partial(encoder_on, sae))
    return near.encode(x)


def _side_by_side(found: measures.Ranked) -> Tensor:
    # Exact in float32: no vocabulary and no SAE has 2²⁴ entries (`ReadoutPlan` holds them to it).
    return torch.cat([found.values.float(), found.places.float()], dim=1)
