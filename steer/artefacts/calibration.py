"""What a calibration found: tables from strength to effect and KL, and how far they hold.

A calibration belongs to one use of one vector: a model, its layers and site, and the tokens it acts
on. The tables are inverted here, so that a request can ask for a KL or an effect.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Sequence
from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.errors import SteerError
from steer.spec import EffectStrength, KLStrength, Site, Where

AUTO_EFFECT = 0.9
"""The strength "auto" is the smallest calibrated one that reaches this share of the effect."""

Finite: TypeAlias = Annotated[float, Field(allow_inf_nan=False)]
NullKind: TypeAlias = Literal["isotropic", "covariance", "shuffled"]
Relative: TypeAlias = KLStrength | EffectStrength | Literal["auto"]
"""A strength that only a calibration turns into a number."""


class _CalibrationPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class MeasuredDose(_CalibrationPart):
    """What one strength did to the answers, strength 0 being the unsteered model.

    `score` is the mean attribute score and `valid` the share of sound answers (None where nothing
    judged them); `perplexity_ratio` is against strength 0; `kl` is the mean KL, in nats, of the
    steered next-token distributions from the unsteered ones along the unsteered answers.
    """

    strength: Finite
    score: Finite | None = None
    valid: Annotated[Finite, Field(ge=0, le=1)] | None = None
    perplexity_ratio: Annotated[Finite, Field(ge=0)]
    kl: Annotated[Finite, Field(ge=0)]


class MeasuredInterval(_CalibrationPart):
    """A figure over the prompts, and its 95 % bootstrap interval."""

    value: Finite
    low: Finite
    high: Finite


class MeasuredNull(_CalibrationPart):
    """A null: a vector of chance with the same site, layers and norms, at a strength of its own.

    `kind` is how it was drawn (`steer.fit.measure.nulls.directions`), `cosine` how near it is to
    the vector; `kl` is what it has at `strength`, and `matched` whether that is the KL it was to
    have. `anti_steered` is its own share of prompts that moved the wrong way.
    """

    kind: NullKind
    seed: int
    cosine: Finite
    strength: Finite
    kl: Annotated[Finite, Field(ge=0)]
    matched: bool
    score: Finite
    anti_steered: Finite | None = None


class NullComparison(_CalibrationPart):
    """What a vector does beside nulls that move the model equally far.

    At `strength` it has `kl` nats and the mean score `score`, on the prompts where `unsteered` is
    that of the unsteered model. `p_value` is (1 + nulls with an effect at least as great) / (1 +
    nulls). `margin` is its score less that of the strongest null, paired by prompt, and
    `above_null` whether the whole interval of such a margin is above 0 for every null: only then is
    what it does called steering. All three are None where no null was run.
    """

    strength: Finite
    kl: Annotated[Finite, Field(ge=0)]
    score: Finite
    unsteered: Finite
    nulls: tuple[MeasuredNull, ...] = ()
    p_value: Annotated[Finite, Field(gt=0, le=1)] | None = None
    margin: MeasuredInterval | None = None
    above_null: bool | None = None

    @property
    def strongest(self) -> MeasuredNull | None:
        """The null with the highest score."""
        return max(self.nulls, key=lambda one: one.score, default=None)


class SafeLimits(_CalibrationPart):
    """What a strength must keep to be safe. The calibrated range ends before the first strength
    whose perplexity ratio is above `perplexity_ratio`, whose validity is below `valid`, or whose
    score is more than `drop` below the best score of a smaller strength."""

    perplexity_ratio: Annotated[Finite, Field(gt=0)] = 1.5
    valid: Annotated[Finite, Field(ge=0, le=1)] = 0.8
    drop: Annotated[Finite, Field(ge=0)] = 0.05


class Calibration(_CalibrationPart):
    """The dose-response of a vector in one use, as it stands on the vector's card.

    `doses` holds every strength that was measured, from 0 up. The first `len(kl)` of them make the
    calibrated range. There `kl` is the monotone (isotonic) fit of the measured KL, and `effect`
    that of the score, scaled to 0 at strength 0 and 1 at the end of the range; None where no
    attribute was scored. `linearity` (R² of a straight line) and `straightness` (2406.11624)
    describe the score over the calibrated range, `monotonicity` (Spearman's ρ) over all strengths.
    `data_sha256` is the hash of the prompts.

    `nulls` says what vectors of chance did at the same KL, and `anti_steered` on which share of the
    prompts the score fell as the strength rose (2407.12404); None on cards from before they were
    measured, and where no attribute was scored.
    """

    model: str
    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    site: Site
    where: Where | None = None
    doses: Annotated[tuple[MeasuredDose, ...], Field(min_length=2, max_length=1024)]
    kl: Annotated[tuple[Finite, ...], Field(min_length=2)]
    effect: Annotated[tuple[Finite, ...], Field(min_length=2)] | None = None
    linearity: Finite | None = None
    straightness: Finite | None = None
    monotonicity: Finite | None = None
    limits: SafeLimits = SafeLimits()
    scorer: str | None = None
    data_sha256: str = ""
    prompts: int = 0
    max_tokens: int = 0
    temperature: float = 0.0
    seed: int = 0
    # Written only where they were measured, so that older cards keep their hash.
    nulls: NullComparison | None = Field(default=None, exclude_if=lambda value: value is None)
    anti_steered: MeasuredInterval | None = Field(
        default=None, exclude_if=lambda value: value is None
    )

    @model_validator(mode="after")
    def _check(self) -> Calibration:
        strengths = [dose.strength for dose in self.doses]
        if strengths[0] != 0 or not _rises(strengths, strictly=True):
            raise ValueError("the strengths of a calibration rise from 0")
        if len(self.kl) > len(self.doses) or self.kl[0] != 0 or not _rises(self.kl):
            raise ValueError("'kl' must rise from 0 and have at most one value a dose")
        if self.effect is not None and (
            len(self.effect) != len(self.kl)
            or (self.effect[0], self.effect[-1]) != (0, 1)
            or not _rises(self.effect)
        ):
            raise ValueError("'effect' must rise from 0 to 1, with a value for each of 'kl'")
        return self

    @property
    def strengths(self) -> tuple[float, ...]:
        """The strengths of the calibrated range, from 0 up."""
        return tuple(dose.strength for dose in self.doses[: len(self.kl)])

    @property
    def safe_strength(self) -> float:
        """The end of the calibrated range: the largest strength that is safe to use."""
        return self.strengths[-1]

    @property
    def above_null(self) -> bool | None:
        """Whether the effect is more than that of chance; None where that was not measured."""
        return None if self.nulls is None else self.nulls.above_null

    def strength_for(self, wanted: Relative) -> float:
        """The smallest calibrated strength that has this effect or KL; the inverse is unique.

        Between measured strengths the effect is linear; so is the root of the KL, because near 0
        the KL grows with the square of the strength. Raises `SteerError` (`outside_calibration`,
        `not_calibrated`), its pointer below the intervention.
        """
        if isinstance(wanted, KLStrength):
            roots = [math.sqrt(value) for value in self.kl]
            self._check_range("kl", wanted.kl, self.kl[-1])
            return _inverse(self.strengths, roots, math.sqrt(wanted.kl))
        if self.effect is None:
            raise SteerError(
                "the vector was calibrated without a scorer, so it knows no effect: give a number "
                "or {'kl': x}, or calibrate it with an attribute's scorer",
                code="not_calibrated",
                param="/strength",
            )
        share = AUTO_EFFECT if wanted == "auto" else wanted.effect
        self._check_range("effect", share, 1.0)
        return _inverse(self.strengths, self.effect, share)

    def kl_at(self, strength: float) -> float:
        """The KL in nats at a strength of the calibrated range."""
        roots = [math.sqrt(value) for value in self.kl]
        return _inverse(roots, self.strengths, strength) ** 2

    def _check_range(self, unit: str, value: float, end: float) -> None:
        if not 0 <= value <= end:
            raise SteerError(
                f"{{{unit!r}: {value:g}}} is outside the calibrated range: {unit} can be 0 to "
                f"{end:.4g}, strengths 0 to {self.safe_strength:g}",
                code="outside_calibration",
                param="/strength",
            )


def _rises(values: Sequence[float], *, strictly: bool = False) -> bool:
    pairs = itertools.pairwise(values)
    return all(a < b if strictly else a <= b for a, b in pairs)


def _inverse(xs: Sequence[float], ys: Sequence[float], y: float) -> float:
    """The smallest x at which the line through the points reaches `y`; `ys` never fall."""
    place = bisect_left(ys, y)
    if place == 0:
        return xs[0]
    share = (y - ys[place - 1]) / (ys[place] - ys[place - 1])
    return xs[place - 1] + share * (xs[place] - xs[place - 1])
