"""Which tokens of a prompt are rows of their own, where a method reads tokens and not prompts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Annotated, Any, Literal, TypeAlias

from pydantic import Discriminator, Tag

from steer.fit.data.prompt import Positions
from steer.spec import Where

TokenNames: TypeAlias = Literal["all", "last", "response"]
TokensRead: TypeAlias = Annotated[
    Annotated[TokenNames, Tag("a name")] | Annotated[Where, Tag("a selection")],
    Discriminator(lambda value: "a selection" if isinstance(value, Mapping | Where) else "a name"),
]

_PLACES: Mapping[Any, Positions] = MappingProxyType(
    {"all": "mean", "last": "last", "response": "response"}
)


def positions_of(tokens: TokensRead) -> Positions:
    """The positions whose mean would stand for the prompt, each of which is a row here."""
    return tokens if isinstance(tokens, Where) else _PLACES[tokens]
