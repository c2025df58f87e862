"""Where a fitted vector acts, by name."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal, TypeAlias

from steer.errors import SteerError
from steer.spec import Where

WhereName: TypeAlias = Literal["last", "onward", "generation", "all"]

WHERES: Mapping[str, Where | None] = MappingProxyType(
    {
        "last": Where(positions=((-1, None),), phases=("prompt",)),
        "onward": Where(positions=((-1, None),)),
        "generation": Where(phases=("generation",)),
        "all": None,
    }
)
"""Where a fitted vector acts unless a request says otherwise: on the last prompt token, on that
and what is generated, on what is generated, or on every token."""


def where_named(name: str) -> Where | None:
    """The place of `WHERES` called `name`; raises `SteerError`."""
    if name not in WHERES:
        raise SteerError(
            f"there is no place {name!r}: use one of {', '.join(WHERES)}", code="invalid_option"
        )
    return WHERES[name]
