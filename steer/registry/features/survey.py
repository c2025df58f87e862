"""A survey: what every feature of an SAE did on a data set, and the file that holds it.

The file is safetensors with one row a feature, so that one feature is read by a few short reads
however many there are. Its header holds `SurveyCard`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer.errors import StorageError
from steer.spec import Site, Where

STEPS = 4
"""Bins of a histogram to a doubling."""
OCTAVES = 8
"""Doublings on either side of 1 that have bins of their own."""
BINS = 2 * OCTAVES * STEPS + 2
"""Two of them are for what is smaller or larger than all others."""
DENSE = 0.1
"""A feature that fires on more of the tokens than this is called dense."""

ACTIVE_NONE = -1
"""In a token's list of active features: no feature."""

_TYPES = {"I32": np.int32, "I64": np.int64, "F32": np.float32, "F64": np.float64}
_MAX_HEADER = 64 << 20

Array = NDArray[Any]


class SurveyCard(BaseModel):
    """What a survey was made of.

    `data` is a digest of the tokens; `vocabulary` the text of each token that occurs; `where` which
    tokens counted, all where it is not there.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: str
    model: str
    layer: int
    site: Site
    d_sae: int
    texts: int
    tokens: int
    data: str
    vocabulary: dict[int, str]
    where: Where | None = Field(default=None, exclude_if=lambda value: value is None)


class FeatureExample(BaseModel):
    """A token on which a feature fired, among those around it.

    `tokens[at]` is the token, `position` its place in the text `text`, both counted from 0.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    text: int
    position: int
    at: int
    tokens: tuple[str, ...]


class FeatureStatistics(BaseModel):
    """What one feature did on the data of a survey.

    `rate` is the share of tokens on which it fired, `mean` its mean activation on those, `largest`
    the greatest; `quantiles` of its activation where it fired (to 9 %, the histogram's width).
    `histogram` counts activations from `edges[i]` up to `edges[i + 1]`. `top` are the tokens with
    the greatest activations, one a text; `sample` some of all tokens on which it fired, drawn
    evenly, and so from the middle of its range as well.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    model: str
    texts: int
    tokens: int
    fired: int
    rate: float
    mean: float
    largest: float
    dead: bool
    dense: bool
    quantiles: dict[str, float]
    edges: tuple[float, ...]
    histogram: tuple[int, ...]
    top: tuple[FeatureExample, ...]
    sample: tuple[FeatureExample, ...]


class TogetherFeature(BaseModel):
    """A feature that fires where another does.

    `together` counts the sampled tokens on which both are among the most active, `jaccard` is
    their share of those on which either is, and `lift` how much oftener that is than chance.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: int
    together: int
    jaccard: float
    lift: float


def bin_of(magnitudes: Array) -> Array:
    """The bin of each activation above 0."""
    steps = np.floor(np.log2(magnitudes.astype(np.float64)) * STEPS).astype(np.int64)
    places: Array = np.clip(steps + OCTAVES * STEPS + 1, 0, BINS - 1)
    return places


def edges_from(first: int, last: int) -> tuple[float, ...]:
    """The edges of the bins from `first` to `last`; the first bin's is 0, the last's infinite."""
    low = [0.0 if n == 0 else 2.0 ** ((n - 1) / STEPS - OCTAVES) for n in range(first, last + 1)]
    high = math.inf if last == BINS - 1 else 2.0 ** (last / STEPS - OCTAVES)
    return (*low, high)


@dataclass(frozen=True)
class Survey:
    """A survey's file, read a row at a time.

    `open_file` opens it; `offsets` say for each array its type, shape and first byte.
    """

    card: SurveyCard
    open_file: Callable[[], IO[bytes]]
    offsets: Mapping[str, tuple[Any, tuple[int, ...], int]]

    @staticmethod
    def read(open_file: Callable[[], IO[bytes]]) -> Survey:
        """Reads the header; raises `StorageError` for what is no survey."""
        with open_file() as file:
            size = int.from_bytes(file.read(8), "little")
            if not 0 < size <= _MAX_HEADER:
                raise StorageError("the file is no survey of features", code="damaged_survey")
            header = file.read(size)
        try:
            entries = json.loads(header)
            card = SurveyCard.model_validate_json(entries.pop("__metadata__")["survey"])
            offsets = {
                name: (
                    np.dtype(_TYPES[one["dtype"]]),
                    tuple(one["shape"]),
                    8 + size + one["data_offsets"][0],
                )
                for name, one in entries.items()
            }
        except (ValueError, KeyError, TypeError, ValidationError) as error:
            raise StorageError(
                "the survey of features is damaged: make it again with `steer sae survey`",
                code="damaged_survey",
            ) from error
        return Survey(card, open_file, offsets)

    def counts(self) -> dict[str, Any]:
        """What it was made of, how many features never fired, and how many fire on a token."""
        fired = self.array("fired")
        return {
            **self.card.model_dump(exclude={"vocabulary", "data"}),
            "never_active": int((fired == 0).sum()),
            "active_per_token": float(fired.sum() / self.card.tokens),
        }

    def array(self, name: str) -> Array:
        """A whole array."""
        with self.open_file() as file:
            return self._rows(file, name, 0, self.offsets[name][1][0])

    def feature(self, feature: int, *, context: int = 10) -> FeatureStatistics:
        """What `feature` did, its examples with `context` tokens on either side."""
        with self.open_file() as file:
            row = {name: self._rows(file, name, feature, 1)[0] for name in _BY_FEATURE}
            top = self._examples(file, row, "top", context)
            sample = self._examples(file, row, "sample", context)
        fired, tokens = int(row["fired"]), self.card.tokens
        bins = np.flatnonzero(row["histogram"])
        first, last = (int(bins[0]), int(bins[-1])) if len(bins) else (0, -1)
        # The last bin's own end would be infinite, which is no number in JSON.
        edges = [min(edge, float(row["largest"])) for edge in edges_from(first, last)]
        return FeatureStatistics(
            model=self.card.model,
            texts=self.card.texts,
            tokens=tokens,
            fired=fired,
            rate=fired / tokens if tokens else 0.0,
            mean=float(row["total"]) / fired if fired else 0.0,
            largest=float(row["largest"]),
            dead=fired == 0,
            dense=fired > DENSE * tokens,
            quantiles=quantiles(row["histogram"], float(row["largest"])),
            edges=tuple(edges) if fired else (),
            histogram=tuple(map(int, row["histogram"][first : last + 1])),
            top=top,
            sample=sample,
        )

    def together(self, feature: int, *, limit: int = 10) -> tuple[TogetherFeature, ...]:
        """The features that fire where `feature` does, by Jaccard's share, from the sampled
        tokens' most active features; those that meet it once alone are left out."""
        active = self.array("active_feature")
        tokens = int((active > ACTIVE_NONE).any(1).sum())
        counts = np.bincount(active[active > ACTIVE_NONE], minlength=self.card.d_sae)
        mine = active[(active == feature).any(1)]
        both = np.bincount(mine[mine > ACTIVE_NONE], minlength=self.card.d_sae)
        both[feature] = 0
        either = counts + counts[feature] - both
        jaccard = both / np.maximum(either, 1)
        best = np.lexsort((np.arange(len(both)), -jaccard))[:limit]
        return tuple(
            TogetherFeature(
                feature=int(other),
                together=int(both[other]),
                jaccard=float(jaccard[other]),
                lift=float(both[other] * tokens / (counts[other] * counts[feature])),
            )
            for other in best
            if both[other] > 1
        )

    def text(self, number: int) -> list[int]:
        """The tokens of a text."""
        with self.open_file() as file:
            start, end = map(int, self._rows(file, "text_start", number, 2))
            return [int(token) for token in self._rows(file, "tokens", start, end - start)]

    def _rows(self, file: IO[bytes], name: str, first: int, count: int) -> Array:
        kind, shape, start = self.offsets[name]
        width = math.prod(shape[1:]) * kind.itemsize
        file.seek(start + first * width)
        data = file.read(count * width)
        if len(data) < count * width:
            raise StorageError(
                "the survey of features is cut off: make it again with `steer sae survey`",
                code="damaged_survey",
            )
        return np.frombuffer(data, kind).reshape(count, *shape[1:])

    def _examples(
        self, file: IO[bytes], row: Mapping[str, Array], which: str, context: int
    ) -> tuple[FeatureExample, ...]:
        found = []
        for value, text, position in zip(
            row[f"{which}_value"], row[f"{which}_text"], row[f"{which}_position"], strict=True
        ):
            if text < 0:
                break
            start, end = map(int, self._rows(file, "text_start", int(text), 2))
            first = max(start, start + int(position) - context)
            last = min(end, start + int(position) + context + 1)
            around = self._rows(file, "tokens", first, last - first)
            found.append(
                FeatureExample(
                    value=float(value),
                    text=int(text),
                    position=int(position),
                    at=start + int(position) - first,
                    tokens=tuple(self.card.vocabulary[int(token)] for token in around),
                )
            )
        return tuple(found)


_BY_FEATURE = (
    *("fired", "total", "largest", "histogram"),
    *("top_value", "top_text", "top_position"),
    *("sample_value", "sample_text", "sample_position"),
)


def quantiles(
    histogram: Array, largest: float, shares: Sequence[float] = (0.25, 0.5, 0.75, 0.9, 0.99)
) -> dict[str, float]:
    """The quantiles of activations whose histogram this is: the geometric middle of their bins,
    and never more than the largest."""
    fired = int(histogram.sum())
    if fired == 0:
        return {}
    reached = np.cumsum(histogram)
    found = {}
    for share in shares:
        place = int(np.searchsorted(reached, max(1, math.ceil(share * fired))))
        low, high = edges_from(place, place)
        middle = min(math.sqrt(low * high), largest) if place < BINS - 1 else largest
        found[f"{share:g}"] = middle or high / 2
    return found
