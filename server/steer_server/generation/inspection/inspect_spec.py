"""What a completion may have read beside its answer: the `inspect` field of a request."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class InspectSpec(BaseModel):
    """Read the prompt through the logit lens, as the steered model sees it.

    `positions` are token positions in the prompt, negative from its end; `layers` are decoder
    blocks (all of them where None); `top` is the number of tokens reported at each place.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kind: Literal["logit_lens"] = "logit_lens"
    layers: (
        Annotated[
            tuple[Annotated[int, Field(strict=True, ge=0)], ...],
            Field(min_length=1, max_length=1024, fail_fast=True),
        ]
        | None
    ) = None
    positions: Annotated[
        tuple[Annotated[int, Field(strict=True)], ...],
        Field(min_length=1, max_length=64, fail_fast=True),
    ] = (-1,)
    top: Annotated[int, Field(strict=True, ge=1, le=50)] = 5
