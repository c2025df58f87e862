"""From measured doses to a calibration: how far it holds, its tables, and the curve's shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from steer.artefacts.calibration import Calibration, MeasuredDose, SafeLimits
from steer.errors import SteerError
from steer.fit.measure.answers import Measured
from steer.fit.measure.straightness import curve_straightness, r_squared

MIN_EFFECT = 0.1
"""A smaller rise of the mean score over the calibrated range is not called an effect."""

DIGITS = 6
"""What is beyond them differs between machines, and would change a card's hash."""


def calibrated_range(doses: Sequence[MeasuredDose], limits: SafeLimits) -> int:
    """How many of the doses, from strength 0 up, keep every limit: the range ends before the first
    that breaks one. Raises `SteerError` (`no_safe_range`) unless two of them do."""
    best = -math.inf
    for count, dose in enumerate(doses):
        broken = _broken(dose, best, limits)
        if broken is not None:
            if count < 2:
                what = "the unsteered answers" if count == 0 else f"strength {dose.strength:g}"
                raise SteerError(
                    f"there is no safe strength: {what} already have {broken}; measure smaller "
                    "strengths, or choose other limits, prompts or another scorer",
                    code="no_safe_range",
                )
            return count
        best = max(best, -math.inf if dose.score is None else dose.score)
    return len(doses)


def _broken(dose: MeasuredDose, best: float, limits: SafeLimits) -> str | None:
    """The limit that `dose` breaks, in words."""
    if dose.perplexity_ratio > limits.perplexity_ratio:
        ratio = dose.perplexity_ratio
        return f"a perplexity ratio of {ratio:.2f}, above {limits.perplexity_ratio:g}"
    if dose.valid is not None and dose.valid < limits.valid:
        return f"{dose.valid:.2f} valid, below {limits.valid:g}"
    if dose.score is not None and dose.score < best - limits.drop:
        return f"a score of {dose.score:.2f}, below {best:.2f} at a smaller strength"
    return None


def tabulated(doses: tuple[MeasuredDose, ...], limits: SafeLimits, **fields: Any) -> Calibration:
    """The calibration of `doses` within `limits`; `fields` are its others. Raises `SteerError`:
    `no_safe_range`, `no_effect`."""
    kept = doses[: calibrated_range(doses, limits)]
    scores = [dose.score for dose in kept if dose.score is not None]
    effect = _effect(kept, scores) if scores else None
    strengths = [dose.strength for dose in kept]
    return Calibration(
        doses=doses,
        kl=_rising([dose.kl for dose in kept]),
        effect=effect,
        linearity=rounded(r_squared(strengths, scores)) if scores else None,
        straightness=rounded(curve_straightness(strengths, scores)) if scores else None,
        monotonicity=_monotonicity(doses),
        limits=limits,
        **fields,
    )


def _effect(doses: Sequence[MeasuredDose], scores: Sequence[float]) -> tuple[float, ...]:
    """The isotonic fit of the scores as shares of its rise, from 0 to exactly 1."""
    fitted = _rising(scores)
    low, high = fitted[0], fitted[-1]
    if high - low < MIN_EFFECT:
        raise SteerError(
            f"the vector has no effect that this scorer sees: up to strength "
            f"{doses[-1].strength:g}, the end of its safe range, the score goes from {low:.3f} to "
            f"{high:.3f}; calibrate without a scorer for KL alone, or use other layers or tokens",
            code="no_effect",
        )
    shares = [rounded((value - low) / (high - low)) or 0.0 for value in fitted]
    return (0.0, *shares[1:-1], 1.0)


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    """The closest series, in squares, that never falls (isotonic regression)."""
    return tuple(rounded(float(value)) or 0.0 for value in isotonic_regression(list(values)).x)


def _monotonicity(doses: Sequence[MeasuredDose]) -> float | None:
    """Spearman's ρ of strength and score; None where there are no scores or they never change."""
    scores = [dose.score for dose in doses if dose.score is not None]
    if len(set(scores)) < 2:
        return None
    return rounded(float(spearmanr([dose.strength for dose in doses], scores).statistic))


def measured_doses(
    strengths: Sequence[float], figures: Sequence[Measured], kl: Sequence[float], *, scored: bool
) -> tuple[MeasuredDose, ...]:
    """The doses as a card holds them, the first of them unsteered."""
    return tuple(
        MeasuredDose(
            strength=strength,
            score=rounded(one.score) if scored else None,
            valid=rounded(one.valid),
            perplexity_ratio=rounded(math.exp(one.loss - figures[0].loss)) or 0.0,
            kl=rounded(nats) or 0.0,
        )
        for strength, one, nats in zip(strengths, figures, kl, strict=True)
    )


def rounded(value: float | None) -> float | None:
    """The value in `DIGITS` digits."""
    return None if value is None else float(f"{value:.{DIGITS}g}")
