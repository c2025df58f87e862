"""Sequences in pieces, for queries with many values."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


def batched(values: Iterable[T], size: int) -> Iterator[list[T]]:
    """`values` in lists of `size`, the last one shorter (`itertools.batched` of Python 3.12)."""
    remaining = iter(values)
    while batch := list(islice(remaining, size)):
        yield batch
