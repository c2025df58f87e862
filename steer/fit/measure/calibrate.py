"""Calibration: what each strength of a vector does, and up to which one it is safe.

The vector is used in one way (layers, tokens) on the same prompts at every strength. What is found
goes onto the card, so that requests can ask for an effect or a KL instead of a number.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence, Sized
from dataclasses import dataclass, replace
from typing import Any

from scipy.optimize import isotonic_regression
from scipy.stats import spearmanr

from steer.artefacts.calibration import Calibration, MeasuredDose, SafeLimits
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.fit.data.pairs import Prompt
from steer.fit.measure.answers import GROUP, Answer, Measured, Progress, answers_under, measured
from steer.fit.measure.divergence import BATCH, divergences
from steer.fit.measure.scoring import AnswerScorer, Score, Scorer
from steer.fit.measure.straightness import curve_straightness, r_squared
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.prompts import prompt_json
from steer.spec import Where, parse_spec

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""The strengths that are measured unless others are given, in multiples of the card's default."""

MIN_EFFECT = 0.1
"""A smaller rise of the mean score over the calibrated range is not called an effect."""

_DIGITS = 6


@dataclass(frozen=True)
class CalibratedVector:
    """A vector with its calibration on the card, and what is too long for a card: an answer at
    each strength, and how many answers the scorer could not judge."""

    vector: ControlVector
    calibration: Calibration
    examples: tuple[tuple[str, ...], ...]
    unjudged: tuple[int, ...]

    @property
    def auto(self) -> float | None:
        """The strength that "auto" stands for; None where no attribute was scored."""
        return None if self.calibration.effect is None else self.calibration.strength_for("auto")

    def as_json(self) -> dict[str, Any]:
        """Everything, for a report."""
        return {
            "vector": self.vector.card.name,
            "sha256": self.vector.sha256,
            "safe_strength": self.calibration.safe_strength,
            "auto_strength": self.auto,
            "default_strength": self.vector.card.default_strength,
            "calibration": self.calibration.model_dump(mode="json", by_alias=True),
            "examples": [list(texts) for texts in self.examples],
            "unjudged": list(self.unjudged),
        }


def calibrate(
    engine: Engine,
    vector: ControlVector,
    prompts: Sequence[Prompt],
    scorer: AnswerScorer | Scorer | None = None,
    *,
    scorer_name: str | None = None,
    strengths: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    where: Where | None = None,
    limits: SafeLimits | None = None,
    max_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    batch: int = BATCH,
    examples: int = 1,
    group: int = GROUP,
    progress: Progress | None = None,
) -> CalibratedVector:
    """Measures `vector` on `prompts` at every strength, and finds its calibrated range.

    `layers` and `where` are the card's unless given; where they are given they become the defaults
    of the calibrated version, because its tables hold for them alone. Without a `scorer` only KL
    and perplexity are measured, and no effect is known. `progress` is told of finished steps,
    `steps_of` in all; what it raises ends the work.

    Raises `SteerError`: `no_prompts`, `invalid_option`, `no_safe_range` where the smallest strength
    already breaks a limit, `no_effect` where the score rises by less than `MIN_EFFECT`.
    """
    grid = _grid(vector, strengths)
    if not prompts:
        raise SteerError("there is nothing to measure on: give prompts", code="no_prompts")
    where = vector.card.default_where if where is None else where.over(vector.card.default_where)
    plans = _plans(engine, vector, grid, layers, where)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed, logprobs=0)
    everything = answers_under(
        engine,
        [prompts] * (1 + len(plans)),
        [None, *plans],
        scorer or _unscored,
        sampling=sampling,
        group=group,
        progress=progress,
    )
    kl = divergences(engine, everything[0], plans, batch=batch, progress=progress).mean(1).tolist()
    figures = [measured(answers, examples=examples) for answers in everything]
    doses = _doses((0.0, *grid), figures, (0.0, *kl), scored=scorer is not None)
    used = tuple(sorted(set(layers))) if layers is not None else vector.card.used_layers
    calibration = _calibration(
        doses,
        limits or SafeLimits(),
        model=engine.info.own_name,
        layers=used,
        site=vector.card.site,
        where=where,
        scorer=scorer_name if scorer is not None else None,
        data_sha256=prompts_sha256(prompts),
        prompts=len(prompts),
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
    )
    changes: dict[str, Any] = {"calibration": calibration}
    if layers is not None:
        changes["default_layers"] = used
    if where is not None:
        changes["default_where"] = where
    return CalibratedVector(
        replace(vector, card=vector.card.model_copy(update=changes)),
        calibration,
        tuple(one.examples for one in figures),
        tuple(one.unjudged for one in figures),
    )


def check_use(
    engine: Engine,
    vector: ControlVector,
    *,
    strengths: Sequence[float] | None = None,
    layers: Sequence[int] | None = None,
    where: Where | None = None,
) -> None:
    """Raises at once what `calibrate` would raise about how the vector is to be used."""
    _plans(engine, vector, _grid(vector, strengths)[:1], layers, where)


def steps_of(prompts: Sized, strengths: Sequence[float] | None = None) -> int:
    """How much `calibrate` tells `progress` of: every answer, and every answer read again."""
    return len(prompts) * (2 + len(GRID if strengths is None else set(strengths)))


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """The hash of the prompts as JSON lines."""
    lines = [
        json.dumps(prompt_json(prompt), ensure_ascii=False, sort_keys=True) + "\n"
        for prompt in prompts
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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


def _calibration(doses: tuple[MeasuredDose, ...], limits: SafeLimits, **fields: Any) -> Calibration:
    kept = doses[: calibrated_range(doses, limits)]
    scores = [dose.score for dose in kept if dose.score is not None]
    effect = _effect(kept, scores) if scores else None
    strengths = [dose.strength for dose in kept]
    return Calibration(
        doses=doses,
        kl=_rising([dose.kl for dose in kept]),
        effect=effect,
        linearity=_rounded(r_squared(strengths, scores)) if scores else None,
        straightness=_rounded(curve_straightness(strengths, scores)) if scores else None,
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
    shares = [_rounded((value - low) / (high - low)) or 0.0 for value in fitted]
    return (0.0, *shares[1:-1], 1.0)


def _rising(values: Sequence[float]) -> tuple[float, ...]:
    """The closest series, in squares, that never falls (isotonic regression)."""
    return tuple(_rounded(float(value)) or 0.0 for value in isotonic_regression(list(values)).x)


def _monotonicity(doses: Sequence[MeasuredDose]) -> float | None:
    """Spearman's ρ of strength and score; None where there are no scores or they never change."""
    scores = [dose.score for dose in doses if dose.score is not None]
    if len(set(scores)) < 2:
        return None
    return _rounded(float(spearmanr([dose.strength for dose in doses], scores).statistic))


def _doses(
    strengths: Sequence[float], figures: Sequence[Measured], kl: Sequence[float], *, scored: bool
) -> tuple[MeasuredDose, ...]:
    return tuple(
        MeasuredDose(
            strength=strength,
            score=_rounded(one.score) if scored else None,
            valid=_rounded(one.valid),
            perplexity_ratio=_rounded(math.exp(one.loss - figures[0].loss)) or 0.0,
            kl=_rounded(nats) or 0.0,
        )
        for strength, one, nats in zip(strengths, figures, kl, strict=True)
    )


def _plans(
    engine: Engine,
    vector: ControlVector,
    strengths: Sequence[float],
    layers: Sequence[int] | None,
    where: Where | None,
) -> list[SteeringPlan]:
    name = vector.card.name or "vector"
    for layer in layers or ():
        engine.info.check_point(HookPoint(layer, vector.card.site), param="/layers")
    cache = plans_of(engine, MemoryLibrary({name: vector}))
    item: dict[str, Any] = {"kind": "add", "vector": name}
    if layers is not None:
        item["layers"] = list(layers)
    if where is not None:
        item["where"] = where
    return [
        cache.plan(parse_spec({"interventions": [{**item, "strength": strength}]}))
        for strength in strengths
    ]


def _grid(vector: ControlVector, strengths: Sequence[float] | None) -> tuple[float, ...]:
    if strengths is None:
        unit = abs(vector.card.default_strength) or 1.0
        return tuple(float(f"{unit * factor:.{_DIGITS}g}") for factor in GRID)
    chosen = tuple(sorted({float(strength) for strength in strengths}))
    if not chosen or not all(0 < strength < math.inf for strength in chosen):
        raise SteerError(
            f"{list(strengths)!r} cannot be calibrated: give strengths above 0; for the other "
            "direction, calibrate the negated vector",
            code="invalid_option",
            param="/strengths",
        )
    return chosen


def _rounded(value: float | None) -> float | None:
    """Six digits: what is beyond them differs between machines, and would change the hash."""
    return None if value is None else float(f"{value:.{_DIGITS}g}")


def _unscored(text: str) -> Score:
    del text
    return Score(0.0)


def mean_kl(
    engine: Engine,
    answers: Sequence[Answer],
    plan: SteeringPlan,
    *,
    batch: int = BATCH,
) -> list[float]:
    """The KL in nats of `plan` on each unsteered answer; checks a calibration on other prompts."""
    return [float(value) for value in divergences(engine, answers, [plan], batch=batch)[0]]
