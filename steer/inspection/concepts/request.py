"""What is asked of a vector-symbolic probe, and how one is taught that is not registered."""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.artefacts.concepts.form import DIMENSIONS, LEAST_EXAMPLES, ConceptName
from steer.inspection.selection import LayerChoice
from steer.prompts import Place, PromptInput
from steer.spec import exactly_one

TEACHING = ("layers", "clusters", "dimensions", "held_out", "seed")
"""Fields that say how a probe is taught: a registered one has been."""


class ConceptExample(PromptInput):
    """A text and what it says: fillers by their roles, such as {"country": "France"}."""

    pairs: Annotated[dict[ConceptName, ConceptName], Field(min_length=1, max_length=16)]


class ConceptsRequest(BaseModel):
    """A registered `probe`, or examples to teach and try one with, and `prompts` to read.

    All are read at `position` (by default the probe's own, or the last token), after `layers` (by
    default the upper half of the model). One in `held_out` examples tries the probe. A filler
    counts as found where its cosine is above `threshold`. A registered probe has its own `layers`,
    `clusters`, `dimensions`, `held_out` and `seed`, and is given none.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra=exactly_one("examples", "probe")
    )

    examples: (
        Annotated[
            tuple[ConceptExample, ...],
            Field(min_length=LEAST_EXAMPLES, max_length=2048, fail_fast=True),
        ]
        | None
    ) = None
    probe: Annotated[str, Field(min_length=1, max_length=256)] | None = None
    prompts: Annotated[tuple[PromptInput, ...], Field(max_length=256, fail_fast=True)] = ()
    layers: LayerChoice | None = None
    position: Place | None = None
    clusters: Annotated[int, Field(strict=True, ge=1, le=64)] = 5
    dimensions: Annotated[int, Field(strict=True, ge=256, le=16_384)] = DIMENSIONS
    threshold: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
    held_out: Annotated[int, Field(strict=True, ge=2, le=10)] = 5
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] = 0

    @model_validator(mode="after")
    def _one(self) -> ConceptsRequest:
        if (self.examples is None) == (self.probe is None):
            raise ValueError(
                "give either 'examples', to teach a probe, or 'probe', the name of a registered one"
            )
        return self
