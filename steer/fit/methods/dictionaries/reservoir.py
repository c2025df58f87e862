"""A bounded, uniform sample of a stream of rows (reservoir sampling)."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


class Reservoir:
    """At most `size` rows of width `width`, float32, each with a note of the caller's.

    Guarantees: all rows, in order, while there are no more than `size`; beyond that every row of
    the stream is as likely to be kept as any other; the same sample for the same stream, however it
    is cut into batches.
    """

    def __init__(self, width: int, size: int, seed: int = 0) -> None:
        self._rows = torch.zeros(0, width)
        self._notes: list[Any] = []
        self._size, self._seen = size, 0
        self._random = random.Random(seed)

    def add(self, rows: Tensor, notes: Sequence[Any] | None = None) -> None:
        """Takes rows `[n, width]`, with one note for each."""
        given = list(notes) if notes is not None else [None] * len(rows)
        room = min(self._size - self._rows.shape[0], rows.shape[0])
        self._rows = torch.cat([self._rows, rows[:room].float()])
        self._notes += given[:room]
        self._seen += room
        for row, note in zip(rows[room:], given[room:], strict=True):
            place = self._random.randrange(self._seen + 1)
            self._seen += 1
            if place < self._size:
                self._rows[place] = row
                self._notes[place] = note

    @property
    def rows(self) -> Tensor:
        """The sample `[at most size, width]`."""
        return self._rows

    @property
    def notes(self) -> Sequence[Any]:
        return self._notes

    @property
    def seen(self) -> int:
        """How many rows went by."""
        return self._seen
