"""Under which condition: `when`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, TypeAlias

from pydantic import (
    ConfigDict,
    Discriminator,
    Tag,
    model_validator,
)

from steer.spec.artefacts import DetectorRef, VectorRef
from steer.spec.base import Frozen, Layer, Number

GateScope: TypeAlias = Literal["prompt", "token", "onward"]


class WhenDirection(Frozen):
    """A gate: act only where the residual stream points along a condition direction.

    The value is the cosine between the residual and the direction (`measure: "cosine"`), or the
    projection on the unit direction (`"projection"`). Scope `token` decides for every token by
    itself. Scope `prompt` decides once, on the last prompt token, and holds the decision for the
    rest of the request; it therefore acts from the last prompt token on (CAST, 2409.05907). Scope
    `onward` opens at the first selected token whose value is in range, for that token and for all
    that come after it in the request.
    """

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"required": [name], "properties": {name: {"type": "number"}}}
                for name in ("above", "below")
            ]
        }
    )

    vector: VectorRef
    above: Number | None = None
    below: Number | None = None
    scope: GateScope = "prompt"
    measure: Literal["cosine", "projection"] = "cosine"
    layer: Layer | None = None

    @model_validator(mode="after")
    def _check(self) -> WhenDirection:
        if self.above is None and self.below is None:
            raise ValueError("a gate needs 'above', 'below' or both")
        if self.above is not None and self.below is not None and self.above >= self.below:
            raise ValueError(f"no value is above {self.above} and below {self.below}")
        return self


class WhenDetected(Frozen):
    """A gate: act only where a detector fires.

    The value is the detector's score at its own hook point, before anything is edited there; it
    must exceed `threshold`, or the detector's own where none is given. `scope` is that of a gate by
    a direction. One that pools takes together the scores of the last tokens that the gate has read:
    of scope `token` and `onward` selected ones, of scope `prompt` the last of the prompt.
    """

    detector: DetectorRef
    threshold: Number | None = None
    scope: GateScope = "prompt"


def _when_tag(value: Any) -> str:
    named = isinstance(value, WhenDetected) or (isinstance(value, dict) and "detector" in value)
    return "a detector" if named else "a direction"


When: TypeAlias = Annotated[
    Annotated[WhenDirection, Tag("a direction")] | Annotated[WhenDetected, Tag("a detector")],
    Discriminator(_when_tag),
]
