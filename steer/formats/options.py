"""What the sender of a file may say about it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from steer.artefacts.control_vector import Card
from steer.errors import SteerError
from steer.formats.sources import SOURCES, Source
from steer.spec import SITES, Site, Where

MAX_OFFSET = 1024
MAX_POSITION = 1 << 20


@dataclass(frozen=True)
class ImportOptions:
    """Facts that a file does not hold, or that overrule what it says.

    `layer_offset` is added to every layer number in a foreign file (None: the format's own
    convention); `source` names the writer, whose convention then holds (a key of `SOURCES`), so the
    two exclude each other. `position` chooses from an array that has token positions (negative from
    its end). `layers` become the card's default layers; for a file with a single direction
    without a layer, they say where it belongs. `site` is where the rows were read and belong.
    `experiment` chooses from a file that describes several. `origin` is where a foreign file was
    had from, for the card's provenance. `strength` is the card's default strength.
    """

    layer_offset: int | None = None
    layers: tuple[int, ...] | None = None
    strength: float | None = None
    description: str | None = None
    licence: str | None = None
    model: str | None = None
    where: Where | None = None
    source: str | None = None
    position: int | None = None
    site: Site | None = None
    experiment: str | None = None
    origin: str | None = None

    def __post_init__(self) -> None:
        for name, most in (("layer_offset", MAX_OFFSET), ("position", MAX_POSITION)):
            number = getattr(self, name)
            if number is not None and abs(number) > most:
                raise SteerError(
                    f"{name} is out of range: give {-most} to {most}",
                    param=f"/{name}",
                    code="invalid_option",
                )
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
        if self.source is not None and self.source not in SOURCES:
            raise SteerError(
                f"from {self.source!r} is not known; known are {', '.join(SOURCES)}",
                param="/from",
                code="invalid_option",
            )
        if self.source is not None and self.layer_offset is not None:
            raise SteerError(
                f"from {self.source!r} says how layers are counted already: leave out "
                "'layer_offset', or 'from'",
                param="/layer_offset",
                code="invalid_option",
            )

        self._check_site()

    def _check_site(self) -> None:
        if self.site is None:
            return
        if self.site not in SITES:
            raise SteerError(
                f"site {self.site!r} is not known; known are {', '.join(SITES)}",
                param="/site",
                code="invalid_option",
            )
        said = None if self.source is None else SOURCES[self.source].site
        if said not in (None, self.site):
            raise SteerError(
                f"from {self.source!r} says that the rows belong at {said}: leave out 'site', or "
                "'from'",
                param="/site",
                code="invalid_option",
            )

    def refuse_placement(self, format: str, told_by: str) -> None:
        """Raises where the sender places rows of which the file says itself where they belong."""
        if self.offset(format) or self.site is not None:
            raise SteerError(
                f"{told_by} says which layers and site it has: leave out 'layer_offset', 'from' "
                "and 'site'",
                code="invalid_option",
                param="/layer_offset",
            )

    def writer(self, format: str) -> Source | None:
        """The writer that `source` names; raises if it does not write `format`."""
        if self.source is None:
            return None
        source = SOURCES[self.source]
        if format not in source.formats:
            raise SteerError(
                f"from {self.source!r} is said of {', '.join(sorted(source.formats))} files; this "
                f"one is {format}: leave it out",
                param="/from",
                code="invalid_option",
            )
        return source

    def offset(self, format: str) -> int | None:
        """What is added to layer numbers, if the sender has said it in one way or the other."""
        source = self.writer(format)
        return self.layer_offset if source is None else source.layer_offset

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
        if self.origin is not None and "file_sha256" in card.provenance:
            changes["provenance"] = {**card.provenance, "origin": self.origin}
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
