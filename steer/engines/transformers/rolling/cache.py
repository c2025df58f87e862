"""A key-value cache for a batch whose rows come and go.

Rows are aligned at their right end: every row's newest token is in the last column, older columns
of a short row are padding. So one decode step writes one column for all rows, whatever their
lengths, and any model that accepts left padding can be served.

Buffers are `[rows, heads, columns, head_dim]`, and the model sees views of them. They grow by
doubling, as far as there is room, and shrink with the batch: rows times columns is a product, and
room that one long prompt once needed would otherwise be multiplied with every row that comes after
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from steer.engines.transformers.room import CacheRoom

_SMALLEST = 64
"""Columns that a buffer has at least: fewer are not worth growing or giving back."""
_ROOMY = 4
"""A buffer with more than so many times the rows, or columns, in use gives room back."""


def _room(needed: int, had: int) -> int:
    """Rows, or columns, to have room for where `needed` are used and there was room for `had`."""
    return max(needed, 2 * had) if needed > had else min(had, 2 * needed)


@dataclass
class Extent:
    """The part of the buffers that is in use, and the tokens that they may have room for; shared by
    all layers."""

    most: int
    rows: int = 0
    columns: int = 0


class RollingLayer(DynamicLayer):  # type: ignore[no-untyped-call]
    """One layer's buffers. `update` writes after the columns in use; the batch moves the end."""

    keys: Tensor
    values: Tensor

    def __init__(self, extent: Extent) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.extent = extent

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        rows, end = self.extent.rows, self.extent.columns + key_states.shape[-2]
        self.reserve(rows, end, key_states, value_states)
        self.keys[:rows, :, self.extent.columns : end] = key_states
        self.values[:rows, :, self.extent.columns : end] = value_states
        return self.keys[:rows, :, :end], self.values[:rows, :, :end]

    def get_seq_length(self) -> int:
        return self.extent.columns

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.extent.columns + query_length, 0

    def reserve(self, rows: int, columns: int, keys: Tensor, values: Tensor) -> None:
        """Makes room for `rows` × `columns`, in the shapes and dtype of `keys` and `values`."""
        if not self.is_initialized:
            self.lazy_initialization(keys, values)
            self.keys = keys.new_zeros(0, keys.shape[1], 0, keys.shape[3])
            self.values = values.new_zeros(0, values.shape[1], 0, values.shape[3])
        had_rows, _, had_columns, _ = self.keys.shape
        if rows > had_rows or columns > had_columns:
            self.resize(*self.roomy(rows, columns))

    def roomy(self, rows: int, columns: int) -> tuple[int, int]:
        """Rows and columns to have room for where so many are needed: more than these, unless that
        is more than there may be."""
        had_rows, _, had_columns, _ = self.keys.shape
        roomy = max(_room(columns, had_columns), _SMALLEST)
        if _room(rows, had_rows) * roomy <= self.extent.most:
            return _room(rows, had_rows), roomy
        return rows, max(min(roomy, self.extent.most // max(rows, 1)), columns)

    def resize(self, rows: int, columns: int) -> None:
        """Gives the buffers room for `rows` × `columns`, which hold what is in use."""
        self.keys = self._resized(self.keys, rows, columns)
        self.values = self._resized(self.values, rows, columns)

    def _resized(self, buffer: Tensor, rows: int, columns: int) -> Tensor:
        _, heads, old_columns, width = buffer.shape
        kept_rows, kept = self.extent.rows, min(old_columns, columns)
        resized = buffer.new_zeros(rows, heads, columns, width)
        resized[:kept_rows, :, :kept] = buffer[:kept_rows, :, :kept]
        return resized


class RollingCache:
    """The batch's cache and its padding mask.

    Assumes: the model's layers keep plain keys and values, or read those of another layer.
    Guarantees: a row's content depends on its own tokens alone; removing a row moves the last row
    into its place (`remove` says which); once trimmed, there is room for at most four times the
    rows and four times the columns in use (64 columns at least), and for none where none are; as
    long as what is in use fits into `room`, so does what there is room for.
    """

    def __init__(self, device: torch.device, room: CacheRoom = CacheRoom()) -> None:  # noqa: B008 - frozen
        self.extent = Extent(room.tokens)
        self._slack = room.slack
        self.cache = DynamicCache()
        self._layers: dict[int, RollingLayer] = {}
        self._mask = torch.zeros(0, 0, dtype=torch.long, device=device)

    @property
    def rows(self) -> int:
        return self.extent.rows

    @property
    def columns(self) -> int:
        return self.extent.columns

    def mask(self, new_columns: int) -> Tensor:
        """`[rows, columns + new_columns]`: 1 where a key may be seen."""
        rows, end = self.extent.rows, self.extent.columns + new_columns
        self._reserve_mask(rows, end)
        self._mask[:rows, self.extent.columns : end] = 1
        return self._mask[:rows, :end]

    def advance(self, columns: int = 1) -> None:
        """Takes the columns that the last forward pass wrote into use."""
        self.extent.columns += columns

    def adopt(self, other: DynamicCache, mask: Tensor) -> None:
        """Adds the rows of a right-aligned prompt cache; `mask` is its padding `[m, columns]`."""
        rows, columns = mask.shape
        if self.extent.rows == 0:
            self.extent.columns = 0
        if columns > self.extent.columns:
            self._shift(columns - self.extent.columns)
        first, last = self.extent.rows, self.extent.rows + rows
        start = self.extent.columns - columns
        for index, theirs in enumerate(other.layers):
            if not getattr(theirs, "is_initialized", False):
                continue  # this layer reads another's keys and values, and keeps none
            mine = self._layer(index)
            keys, values = cast(RollingLayer, theirs).keys, cast(RollingLayer, theirs).values
            mine.reserve(last, self.extent.columns, keys, values)
            for target, source in ((mine.keys, keys), (mine.values, values)):
                target[first:last, :, :start] = 0
                target[first:last, :, start : self.extent.columns] = source
        self._reserve_mask(last, self.extent.columns)
        self._mask[first:last, :start] = 0
        self._mask[first:last, start : self.extent.columns] = mask
        self.extent.rows = last

    def _layer(self, index: int) -> RollingLayer:
        if index not in self._layers:
            layers = self.cache.layers
            layers.extend(RollingLayer(self.extent) for _ in range(len(layers), index + 1))
            self._layers[index] = cast(RollingLayer, layers[index])
        return self._layers[index]

    def remove(self, row: int) -> int:
        """Drops `row`; returns the index of the row that now stands in its place (the last)."""
        last = self.extent.rows - 1
        if row != last:
            end = self.extent.columns
            for layer in self._layers.values():
                layer.keys[row, :, :end] = layer.keys[last, :, :end]
                layer.values[row, :, :end] = layer.values[last, :, :end]
            self._mask[row, :end] = self._mask[last, :end]
        self.extent.rows = last
        if last == 0:
            self.extent.columns = 0
        return last

    def trim(self) -> None:
        """Drops leading columns that are padding in every row, once there are more than the room's
        slack, and gives back room that the rows left do not use."""
        if self.extent.rows and self.extent.columns > self._slack:
            seen = self._mask[: self.extent.rows, : self.extent.columns].any(0)
            empty = int(seen.to(torch.uint8).argmax())
            if empty > self._slack:
                self._shift(-empty)
        self._give_back()

    def _give_back(self) -> None:
        rows, columns = self.extent.rows, self.extent.columns
        for layer in self._layers.values():
            had_rows, _, had_columns, _ = layer.keys.shape
            wide = had_columns > max(_ROOMY * columns, _SMALLEST)
            if had_rows > _ROOMY * rows or (rows and wide):
                layer.resize(*layer.roomy(rows, columns) if rows else (0, 0))
        if not rows:
            self._mask = self._mask.new_zeros(0, 0)

    def _shift(self, by: int) -> None:
        """Moves every row `by` columns to the right; the columns freed on the left are padding."""
        rows, end = self.extent.rows, self.extent.columns
        start, self.extent.columns = max(-by, 0), end + by
        for layer in self._layers.values() if rows else ():
            layer.reserve(rows, end + by, layer.keys, layer.values)
            for buffer in (layer.keys, layer.values):
                moved = buffer[:rows, :, start:end].clone()
                buffer[:rows, :, start + by : end + by] = moved
                buffer[:rows, :, : max(by, 0)] = 0
        self._reserve_mask(rows, end + by)
        kept = self._mask[:rows, start:end].clone()
        self._mask[:rows, start + by : end + by] = kept
        self._mask[:rows, : max(by, 0)] = 0

    def _reserve_mask(self, rows: int, columns: int) -> None:
        old_rows, old_columns = self._mask.shape
        if rows > old_rows or columns > old_columns:
            size = (max(rows, old_rows), max(columns, 2 * old_columns, 64))
            grown = self._mask.new_zeros(size)
            grown[:old_rows, :old_columns] = self._mask
            self._mask = grown
