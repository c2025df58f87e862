"""A model that turns texts into vectors, so that labels are found by what they mean."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steer.errors import CapacityError
from steer.fit.features.asked.outside import OutsideModel, outside_client

LONGEST = 512
"""Characters of a text that are embedded: what a label is about stands at its beginning."""
WIDEST = 16_384
"""Numbers of a vector."""


@dataclass(frozen=True)
class Embedder:
    """The model at `outside`, given `batch` texts in one call."""

    outside: OutsideModel
    batch: int = 128
    retries: int = 2
    timeout: float = 60.0

    def embed(
        self, texts: Sequence[str], *, progress: Callable[[int], None] | None = None
    ) -> NDArray[np.float32]:
        """Rows of length 1 `[texts, width]`, one for each text.

        `progress` is told of each batch that came. Raises `CapacityError` (`embedder_failed`) where
        the server cannot be used, or answers with anything but as many rows of one finite width.
        """
        rows = []
        with outside_client(
            self.outside,
            what="embedder",
            error=CapacityError,
            retries=self.retries,
            timeout=self.timeout,
            parallel=1,
        ) as (client, _):
            for first in range(0, len(texts), self.batch):
                given = [text[:LONGEST] for text in texts[first : first + self.batch]]
                found = client.embeddings.create(
                    model=self.outside.model, input=given, encoding_format="float"
                )
                data = sorted(found.data or (), key=lambda one: one.index)
                rows.append(self._unit([one.embedding for one in data], len(given)))
                if progress is not None:
                    progress(len(given))
        if len({one.shape[1] for one in rows}) > 1:
            raise self._not_embeddings("rows of several widths")
        return np.concatenate(rows) if rows else np.zeros((0, 0), np.float32)

    def _unit(self, rows: Sequence[Sequence[float]], count: int) -> NDArray[np.float32]:
        """The rows as a matrix, each divided by its length."""
        widths = {len(row) for row in rows}
        if len(rows) != count or len(widths) != 1 or not 0 < max(widths) <= WIDEST:
            raise self._not_embeddings(f"{len(rows)} rows of widths {sorted(widths)[:3]}")
        try:
            found = np.array(rows, np.float64)
        except (TypeError, ValueError):
            raise self._not_embeddings("something that is no number") from None
        length = np.linalg.norm(found, axis=1, keepdims=True)
        if not np.isfinite(length).all() or not length.all():
            raise self._not_embeddings("a row that is zero or not finite")
        unit: NDArray[np.float32] = (found / length).astype(np.float32)
        return unit

    def _not_embeddings(self, what: str) -> CapacityError:
        return CapacityError(
            f"the embedder {self.outside.model!r} answered with {what}: name a model that embeds "
            "texts",
            code="embedder_failed",
        )
