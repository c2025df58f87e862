"""The rows that a training sees: of one or more captures, in an order known for every step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.errors import SteerError
from steer.fit.bulk.shards import CapturedStates, Numbers

LEAST_ROWS = 64


@dataclass
class TrainingRows:
    """Rows of `captures`, those of whole texts kept for measuring left out.

    `trained` and `held_out` are row numbers over all captures, one after the other. `labels`
    `[rows, c]` are 0, 1 or NaN for each of them.
    """

    captures: Sequence[CapturedStates]
    trained: Numbers
    held_out: Numbers
    labels: Float[Tensor, "rows c"] | None = None
    _order: tuple[tuple[int, int], Numbers] | None = field(default=None, init=False, repr=False)

    @staticmethod
    def of(
        captures: Sequence[CapturedStates],
        *,
        held_out: float,
        seed: int,
        text_labels: Sequence[Float[Tensor, "texts c"]] | None = None,
    ) -> TrainingRows:
        """`held_out` is the share of each capture's texts that are kept for measuring;
        `text_labels` those of each capture's texts.

        Raises `SteerError` (`too_few_rows`, `mixed_captures`).
        """
        first = captures[0]
        for one in captures:
            if (one.card.model, one.point, one.width) != (
                first.card.model,
                first.point,
                first.width,
            ):
                raise SteerError(
                    f"captures of {first.card.model!r} at {first.point} and of "
                    f"{one.card.model!r} at {one.point}: an SAE is trained at one point of one "
                    "model",
                    code="mixed_captures",
                )
        kept, measured, labels, start = [], [], [], 0
        for place, one in enumerate(captures):
            here = np.isin(one.texts, held_out_texts(one, place, held_out, seed))
            kept.append(start + np.flatnonzero(~here))
            measured.append(start + np.flatnonzero(here))
            if text_labels is not None:
                labels.append(text_labels[place][torch.from_numpy(one.texts)])
            start += len(one)
        rows = TrainingRows(
            captures,
            np.concatenate(kept),
            np.concatenate(measured),
            torch.cat(labels) if text_labels is not None else None,
        )
        if len(rows.trained) < LEAST_ROWS or len(rows.held_out) < LEAST_ROWS:
            raise SteerError(
                f"{len(rows.trained)} rows to train on and {len(rows.held_out)} to measure on are "
                f"too few: an SAE wants hundreds of thousands, and at least {LEAST_ROWS} of each",
                code="too_few_rows",
            )
        return rows

    @property
    def width(self) -> int:
        return self.captures[0].width

    def steps(self, epochs: float, batch: int) -> int:
        """How many whole batches there are in so many passes over the rows."""
        return max(1, int(epochs * len(self.trained)) // batch)

    def batch(self, step: int, size: int, seed: int) -> Numbers:
        """The row numbers of step `step`, the same however training came there: each pass over the
        rows is shuffled by itself."""
        size = min(size, len(self.trained))
        an_epoch = len(self.trained) // size
        epoch, place = divmod(step, an_epoch)
        return self._shuffled(epoch, seed)[place * size : (place + 1) * size]

    def _shuffled(self, epoch: int, seed: int) -> Numbers:
        """The order of one pass; that of the last one asked for is kept, for all of its steps."""
        if self._order is None or self._order[0] != (epoch, seed):
            order = np.random.default_rng([seed, epoch]).permutation(len(self.trained))
            self._order = (epoch, seed), self.trained[order]
        return self._order[1]

    def read(self, numbers: Numbers) -> Float[Tensor, "n width"]:
        """The rows of these numbers, in their order."""
        ends = np.cumsum([len(one) for one in self.captures])
        owners = np.searchsorted(ends, numbers, side="right")
        found = torch.empty(len(numbers), self.width)
        for owner in np.unique(owners):
            here = np.flatnonzero(owners == owner)
            start = 0 if owner == 0 else ends[owner - 1]
            found[torch.from_numpy(here)] = self.captures[owner].rows(numbers[here] - start)
        return found

    def sample(self, numbers: Numbers, most: int, seed: int) -> Float[Tensor, "n width"]:
        """At most `most` of the rows of these numbers, drawn evenly."""
        if len(numbers) > most:
            numbers = np.random.default_rng(seed).choice(numbers, most, replace=False)
        return self.read(np.sort(numbers))


def held_out_texts(capture: CapturedStates, place: int, share: float, seed: int) -> Numbers:
    """The numbers of the texts of capture number `place` that are kept for measuring."""
    order = np.random.default_rng([seed, place]).permutation(capture.card.texts)
    return np.sort(order[: round(share * capture.card.texts)])
