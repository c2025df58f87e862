"""What the sender of a file may say about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from steer.control_vector import Card
from steer.errors import SteerError
from steer.spec import Where


@dataclass(frozen=True)
class ImportOptions:
    """Facts that a file does not hold, or that overrule what it says.

    `layer_offset` is added to every layer number in a foreign file (None: the format's own
    convention). `layers` become the card's default layers; for a file with a single direction
    without a layer, they say where it belongs. `strength` is the card's default strength.
    """

    layer_offset: int | None = None
    layers: tuple[int, ...] | None = None
    strength: float | None = None
    description: str | None = None
    licence: str | None = None
    model: str | None = None
    where: Where | None = None

    def __post_init__(self) -> None:
        if self.strength is not None and not math.isfinite(self.strength):
            raise SteerError(
                f"strength {self.strength!r} is not a finite number",
                param="/strength",
                code="invalid_option",
            )
        if self.layers is not None and (not self.layers or min(self.layers) < 0):
            raise SteerError(
                f"layers {list(self.layers)!r}: give at least one 0-based layer",
                param="/layers",
                code="invalid_option",
            )

    def described(self, card: Card) -> Card:
        """`card` with what these options overrule."""
        changes: dict[str, Any] = {
            "default_layers": self._default_layers(card),
            "default_strength": self.strength,
            "default_where": self.where,
            "description": self.description,
            "licence": self.licence,
            "model": self.model,
        }
        given = {key: value for key, value in changes.items() if value is not None}
        return card.model_copy(update=given)

    def _default_layers(self, card: Card) -> tuple[int, ...] | None:
        if self.layers is None:
            return None
        missing = sorted(set(self.layers) - set(card.layers))
        if missing:
            raise SteerError(
                f"layers {missing} are not in the file, which has the layers {list(card.layers)}",
                param="/layers",
                code="layer_not_in_vector",
            )
        return tuple(sorted(set(self.layers)))
