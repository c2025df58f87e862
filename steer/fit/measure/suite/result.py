"""What a suite found: of each concept and way to steer, and over all concepts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from steer.artefacts.calibration import NullComparison
from steer.fit.measure.answers import mean
from steer.fit.measure.bootstrap import Interval, Resamples
from steer.fit.measure.suite.rating import Rating

RowKind = Literal["unsteered", "prompt", "steering"]

ANCHORS = {"prompt": 0.894, "LoReFT": 0.741, "DiffMean": 0.239, "SAE": 0.165}
"""Published overall scores (AxBench, 2501.17148): other models, concepts and judge, for scale."""


@dataclass(frozen=True)
class ConceptRow:
    """One way to steer towards one concept, on the prompts that chose no factor.

    `factor` is the one that was best on the others (None where there was none to choose), where
    `chosen_from` holds the mean overall rating of each. `nulls` compares the overall rating with
    that of vectors of chance at the same KL; `no_nulls` says why there are none.
    """

    method: str
    kind: RowKind
    ratings: tuple[Rating, ...]
    factor: float | None = None
    chosen_from: tuple[tuple[float, float], ...] = ()
    nulls: NullComparison | None = None
    no_nulls: str | None = None
    example: str = ""

    @property
    def overall(self) -> float:
        return mean([one.overall for one in self.ratings])

    def as_json(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "kind": self.kind,
            **_means(self.ratings),
            "factor": self.factor,
            "chosen_from": [list(one) for one in self.chosen_from],
            "nulls": None if self.nulls is None else self.nulls.model_dump(mode="json"),
            "no_nulls": self.no_nulls,
            "example": self.example,
            "ratings": [[one.concept, one.instruction, one.fluency] for one in self.ratings],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> ConceptRow:
        """A row that `as_json` made."""
        nulls = value["nulls"]
        return ConceptRow(
            method=value["method"],
            kind=value["kind"],
            ratings=tuple(Rating(*three) for three in value["ratings"]),
            factor=value["factor"],
            chosen_from=tuple((one, two) for one, two in value["chosen_from"]),
            nulls=None if nulls is None else NullComparison.model_validate(nulls),
            no_nulls=value["no_nulls"],
            example=value["example"],
        )


@dataclass(frozen=True)
class ConceptResult:
    """All rows of one concept."""

    concept: str
    rows: tuple[ConceptRow, ...]


@dataclass(frozen=True)
class MethodSummary:
    """A way to steer over all concepts: means of the concepts' means, the overall one with a
    bootstrap interval over concepts. `null` is the mean overall rating of all its nulls,
    `above_null` the share of the concepts with nulls in which it is above them."""

    method: str
    kind: RowKind
    concept: float
    instruction: float
    fluency: float
    overall: Interval
    null: float | None
    above_null: float | None


@dataclass(frozen=True)
class SuiteResult:
    """A suite that was run."""

    suite: str
    model: str
    panel: str
    prompts: int
    concepts: tuple[ConceptResult, ...]
    seed: int = 0

    @property
    def summaries(self) -> tuple[MethodSummary, ...]:
        """The methods in their order."""
        draws = Resamples.draw(len(self.concepts), seed=self.seed)
        columns = zip(*(one.rows for one in self.concepts), strict=True)
        return tuple(_summary(draws, rows) for rows in columns)

    def as_json(self) -> dict[str, Any]:
        return {
            "suite": self.suite,
            "model": self.model,
            "panel": self.panel,
            "prompts": self.prompts,
            "seed": self.seed,
            "scale": "0 to 2",
            "published": ANCHORS,
            "methods": [asdict(one) for one in self.summaries],
            "concepts": [
                {"concept": one.concept, "rows": [row.as_json() for row in one.rows]}
                for one in self.concepts
            ],
        }


def _summary(draws: Resamples, rows: Sequence[ConceptRow]) -> MethodSummary:
    nulls = [row.nulls for row in rows if row.nulls is not None and row.nulls.nulls]
    means = [_means(row.ratings) for row in rows]
    return MethodSummary(
        method=rows[0].method,
        kind=rows[0].kind,
        concept=mean([one["concept"] for one in means]),
        instruction=mean([one["instruction"] for one in means]),
        fluency=mean([one["fluency"] for one in means]),
        overall=draws.mean([row.overall for row in rows]),
        null=mean([one.score for found in nulls for one in found.nulls]) if nulls else None,
        above_null=mean([float(bool(one.above_null)) for one in nulls]) if nulls else None,
    )


def _means(ratings: Sequence[Rating]) -> dict[str, float]:
    return {
        "concept": mean([one.concept for one in ratings]),
        "instruction": mean([one.instruction for one in ratings]),
        "fluency": mean([one.fluency for one in ratings]),
        "overall": mean([one.overall for one in ratings]),
    }
