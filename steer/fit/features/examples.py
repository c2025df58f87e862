"""The best few tokens of every feature, however the stream is cut."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from steer.registry.features.survey import Array


class Examples:
    """For each of `d_sae` features the `count` tokens of the lowest rank, and at equal rank the
    first of them; with `one_a_text` only the best of each text.

    Assumes: texts, and the positions of a text, are offered in rising order.
    Guarantees: what is kept does not depend on how many are offered at once.
    """

    def __init__(self, d_sae: int, count: int, *, one_a_text: bool) -> None:
        self._count, self._one_a_text = count, one_a_text
        self.rank = np.full((d_sae, count), np.inf)
        self.value = np.zeros((d_sae, count), np.float32)
        self.text = np.full((d_sae, count), -1, np.int32)
        self.position = np.full((d_sae, count), -1, np.int32)

    def offer(
        self, feature: Array, rank: Array, value: Array, text: Array, position: Array
    ) -> None:
        """Offers tokens: of each the feature, its rank, its activation, and where it is."""
        # Most are worse than all that are kept; the rest is what has to be sorted.
        fit = rank < self.rank[feature, -1]
        if not fit.any():
            return
        offered = (feature[fit], rank[fit], value[fit], text[fit], position[fit])
        touched = np.unique(offered[0])
        row, column = np.nonzero(self.text[touched] >= 0)
        held = touched[row]
        kept = (
            held,
            self.rank[held, column],
            self.value[held, column],
            self.text[held, column],
            self.position[held, column],
        )
        rows = [np.concatenate(pair) for pair in zip(kept, offered, strict=True)]
        if self._one_a_text:
            rows = _first_of(rows, (0, 3), order=(4, 1, 3, 0))
        order = np.lexsort((rows[4], rows[3], rows[1], rows[0]))
        rows = [one[order] for one in rows]
        place = _place_in_group(rows[0])
        best = place < self._count
        feature, place = rows[0][best], place[best]
        self.rank[touched], self.text[touched] = np.inf, -1
        self.value[touched], self.position[touched] = 0.0, -1
        for array, column_of in zip(
            (self.rank, self.value, self.text, self.position), rows[1:], strict=True
        ):
            array[feature, place] = column_of[best]

    def arrays(self, name: str, *, ranks: bool = False) -> dict[str, Array]:
        """What is kept, under `name`; with `ranks` all that it takes to go on."""
        found = {"value": self.value, "text": self.text, "position": self.position}
        return {f"{name}_{key}": one for key, one in found.items()} | (
            {f"{name}_rank": self.rank} if ranks else {}
        )

    def restore(self, name: str, arrays: Mapping[str, Array]) -> None:
        """Goes on from `arrays(name, ranks=True)`."""
        self.rank, self.value = arrays[f"{name}_rank"].copy(), arrays[f"{name}_value"].copy()
        self.text, self.position = (
            arrays[f"{name}_text"].copy(),
            arrays[f"{name}_position"].copy(),
        )


def chance_of(*numbers: Array) -> Array:
    """A number in [0, 1) for each row of whole numbers, the same every time and as good as drawn
    (splitmix64)."""
    mixed = np.zeros(np.broadcast_shapes(*(n.shape for n in numbers)), np.uint64)
    for number in numbers:
        mixed = mixed + number.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
        mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        mixed = mixed ^ (mixed >> np.uint64(31))
    return (mixed >> np.uint64(11)).astype(np.float64) / 2.0**53


def _first_of(rows: list[Array], group: tuple[int, ...], *, order: tuple[int, ...]) -> list[Array]:
    """Of the rows that agree in the columns `group` the first, sorted by `order` (last first)."""
    sorting = np.lexsort([rows[column] for column in order])
    rows = [one[sorting] for one in rows]
    new = np.ones(len(rows[0]), bool)
    new[1:] = np.any([rows[column][1:] != rows[column][:-1] for column in group], axis=0)
    return [one[new] for one in rows]


def _place_in_group(sorted_groups: Array) -> Array:
    """For each row, how many rows of its group stand before it."""
    starts = np.flatnonzero(np.r_[True, sorted_groups[1:] != sorted_groups[:-1]])
    lengths = np.diff(np.r_[starts, len(sorted_groups)])
    return np.arange(len(sorted_groups)) - np.repeat(starts, lengths)
