"""Which tokens of a prompt are rows of their own, where a method reads tokens and not prompts."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

from steer.fit.data.prompt import Positions

TokensRead: TypeAlias = Literal["all", "last", "response"]

PLACES: Mapping[TokensRead, Positions] = MappingProxyType(
    {"all": "mean", "last": "last", "response": "response"}
)
"""The positions whose mean would stand for the prompt, each of which is a row here."""
