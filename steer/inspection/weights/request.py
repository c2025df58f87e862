"""What of a model's weights is to be read."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.inspection.next_token import TokenChoice
from steer.spec import Index, Layer, Name


class WeightsRequest(BaseModel):
    """One of three: a `neuron` of `layer`, a `head` of `layer`, a registered `vector` (of `layer`,
    or of all layers that it has). With none of them it is a table of all heads, of `layer` or of
    all layers.

    A head has two circuits: `ov`, what it writes where it attends to a token, and `qk`, which token
    it attends to from which. `inputs` are tokens for which is told what the head writes where it
    attends to them, or with `qk` what it looks for from them. `top` is how many tokens, or pairs of
    tokens, are told of each.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Layer | None = None
    neuron: Index | None = None
    head: Index | None = None
    vector: Name | None = None
    circuit: Literal["ov", "qk"] = "ov"
    inputs: Annotated[tuple[TokenChoice, ...], Field(max_length=16, fail_fast=True)] = ()
    top: Annotated[int, Field(strict=True, ge=1, le=100)] = 10

    @model_validator(mode="after")
    def _one_part(self) -> WeightsRequest:
        named = [one for one in ("neuron", "head", "vector") if getattr(self, one) is not None]
        if len(named) > 1:
            raise ValueError(f"{' and '.join(map(repr, named))} are read one at a time: give one")
        if self.layer is None and named and named != ["vector"]:
            raise ValueError(f"a {named[0]!r} is one of a layer's: give 'layer' too")
        if self.inputs and self.head is None:
            raise ValueError("'inputs' are tokens that a head attends to: give 'layer' and 'head'")
        if self.circuit == "qk" and named and named != ["head"]:
            raise ValueError(f"a {named[0]!r} attends to nothing: 'circuit' is one of heads'")
        return self
