"""What a spec names, carries or describes: vectors, SAEs, adapters, maps, lenses, detectors."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from pydantic import (
    Discriminator,
    Field,
    Tag,
)

from steer.references import Names
from steer.spec.base import Frozen, Index, Name


class InlineVector(Frozen):
    """A vector that travels with the request: base64 of a safetensors file.

    The file holds one row per layer (`layers.N`), or a single row that `layer` places.
    """

    data: Annotated[str, Field(min_length=1, max_length=64 << 20)]
    layer: Index | None = None


LensRef: TypeAlias = Annotated[Name, Names("lens")]


class TokenVector(Frozen):
    """The direction along which a lens reads a token: of each layer the unit direction in which the
    token's logit grows fastest.

    `token` is an id, or a text that is one token of the model (a leading space counts); `lens` a
    registered lens, tuned or Jacobian, or, left out, the logit lens.
    """

    token: Index | Annotated[str, Field(min_length=1, max_length=1024)]
    lens: LensRef | None = None


def _vector_tag(value: Any) -> str:
    if isinstance(value, TokenVector) or (isinstance(value, dict) and "token" in value):
        return "a token"
    return "inline" if isinstance(value, dict | InlineVector) else "a name"


VectorRef: TypeAlias = Annotated[
    Annotated[Name, Tag("a name")]
    | Annotated[InlineVector, Tag("inline")]
    | Annotated[TokenVector, Tag("a token")],
    Discriminator(_vector_tag),
    Names("vector"),
]
SAERef: TypeAlias = Annotated[Name, Names("sae")]
AdapterRef: TypeAlias = Annotated[Name, Names("low_rank")]
MapRef: TypeAlias = Annotated[Name, Names("affine")]
DetectorRef: TypeAlias = Annotated[Name, Names("detector")]
