"""Names for the tokens that a vector or an adapter steers."""

from __future__ import annotations

from enum import StrEnum


class WhereChoice(StrEnum):
    """The last prompt token; that and the answer; the answer; every token."""

    last = "last"
    onward = "onward"
    generation = "generation"
    all = "all"
