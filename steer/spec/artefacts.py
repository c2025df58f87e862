"""What a spec names, carries or describes: vectors, SAEs, adapters, maps, lenses, detectors."""

from __future__ import annotations

from typing import Annotated, Any, Self, TypeAlias

from pydantic import (
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    model_validator,
)
from pydantic_core import PydanticCustomError

from steer.references import Names
from steer.spec.base import Frozen, Index, Layer, Name, Number, exactly_one

_FORMS = (
    'a vector is a name, {"token": " Paris"}, {"values": [0.1, …], "layer": 3}, or '
    '{"data": "BASE64"}, of a file'
)
MAX_INLINE_VALUES = 1 << 16
"""The numbers of a row inside a request: more than any model's stream is wide."""


def _check_data_form(value: Any) -> Any:
    if isinstance(value, list | tuple):
        raise PydanticCustomError(
            "vector_form", "'data' is base64 of a safetensors file: send numbers as 'values'"
        )
    return value


class InlineVector(Frozen):
    """A vector that travels with the request: its numbers, or base64 of a safetensors file.

    `values` are one row `[d]` at the output of the block `layer`. The file in `data` holds a row
    for each layer (`layers.N`), or a single one that `layer` places.
    """

    model_config = ConfigDict(json_schema_extra=exactly_one("data", "values"))

    data: (
        Annotated[
            Annotated[str, Field(min_length=1, max_length=64 << 20)],
            BeforeValidator(_check_data_form),
        ]
        | None
    ) = None
    values: (
        Annotated[
            tuple[Number, ...], Field(min_length=1, max_length=MAX_INLINE_VALUES, fail_fast=True)
        ]
        | None
    ) = None
    layer: Layer | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if (self.data is None) == (self.values is None):
            raise ValueError(
                "a vector inside a request is 'values', a list of numbers, or 'data', base64 of a "
                "safetensors file: give one of them"
            )
        if self.values is not None and self.layer is None:
            raise ValueError("'values' are one row: say in 'layer' at which block's output it lies")
        return self


LensRef: TypeAlias = Annotated[Name, Names("lens")]


class TokenVector(Frozen):
    """The direction along which a lens reads a token: of each layer the unit direction in which the
    token's logit grows fastest.

    `token` is an id, or a text that is one token of the model (a leading space counts); `lens` a
    registered lens, tuned or Jacobian, or, left out, the logit lens.
    """

    token: Index | Annotated[str, Field(min_length=1, max_length=1024)]
    lens: LensRef | None = None


def _check_vector_form(value: Any) -> Any:
    """A row alone, which many send, says neither its layer nor what it is."""
    if isinstance(value, list | tuple):
        raise PydanticCustomError("vector_form", f"{_FORMS}: send the numbers as 'values'")
    return value


def _vector_tag(value: Any) -> str:
    if isinstance(value, TokenVector) or (isinstance(value, dict) and "token" in value):
        return "a token"
    return "inline" if isinstance(value, dict | InlineVector) else "a name"


VectorRef: TypeAlias = Annotated[
    Annotated[Name, Tag("a name")]
    | Annotated[InlineVector, Tag("inline")]
    | Annotated[TokenVector, Tag("a token")],
    Discriminator(_vector_tag),
    BeforeValidator(_check_vector_form),
    Names("vector"),
]
SAERef: TypeAlias = Annotated[Name, Names("sae")]
AdapterRef: TypeAlias = Annotated[Name, Names("low_rank")]
MapRef: TypeAlias = Annotated[Name, Names("affine")]
DetectorRef: TypeAlias = Annotated[Name, Names("detector")]
