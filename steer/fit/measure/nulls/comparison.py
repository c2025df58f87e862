"""What a vector does, beside nulls that move the model equally far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.stats import false_discovery_control
from torch import Tensor

from steer.artefacts.calibration import MeasuredInterval, MeasuredNull, NullComparison
from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine, SamplingParams
from steer.errors import Unsupported
from steer.fit.data.prompt import Prompt
from steer.fit.measure.answers import GROUP, Answer, Progress
from steer.fit.measure.bootstrap import Interval, Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.doses import rounded
from steer.fit.measure.nulls.directions import answer_states, null_vectors
from steer.fit.measure.nulls.in_plans import added_vector
from steer.fit.measure.nulls.runs import NULLS, Contender, ContenderRuns, null_steps, run_nulls
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.plan.plan import SteeringPlan
from steer.spec import Site


def compare(
    draws: Resamples,
    plain: Sequence[Answer],
    contender: Contender,
    found: ContenderRuns,
) -> NullComparison:
    """The comparison as it stands on a card and in reports; `found` are the runs of the contender's
    nulls, which may be none.

    `plain` are the unsteered answers to the same prompts, in order.
    """
    scores = values(contender.answers)
    baseline = values(plain)
    runs, nulls = found.nulls, [values(run.answers) for run in found.nulls]
    means = [_rounded(draws.mean(one).value) for one in nulls]
    own = _rounded(draws.mean(scores).value)
    margins = [draws.difference(scores, one) for one in nulls]
    return NullComparison(
        strength=_rounded(contender.strength),
        kl=_rounded(found.kl),
        score=own,
        unsteered=_rounded(draws.mean(baseline).value),
        nulls=tuple(
            MeasuredNull(
                kind=run.null.kind,
                seed=run.null.seed,
                cosine=_rounded(run.null.cosine),
                strength=_rounded(run.match.strength),
                kl=_rounded(run.match.kl),
                matched=run.match.reached,
                score=mean,
                anti_steered=_rounded(wrong_way(draws, baseline, one).value),
            )
            for run, one, mean in zip(runs, nulls, means, strict=True)
        ),
        p_value=_rounded(p_value(own, means)) if nulls else None,
        margin=on_card(margins[int(np.argmax(means))]) if nulls else None,
        # Over each of them, not the strongest alone: one that is weaker here may vary more, and be
        # the stronger on other prompts. Where all must hold, no level has to be corrected.
        above_null=all(one.low > 0 for one in margins) if nulls else None,
    )


@dataclass(frozen=True)
class SteeredAnswers:
    """A plan, and what it made of the prompts."""

    plan: SteeringPlan
    answers: Sequence[Answer]


def compare_plans(
    engine: Engine,
    prompts: Sequence[Prompt],
    plain: Sequence[Answer],
    steered: Sequence[SteeredAnswers],
    scorer: AnswerScorer | Scorer,
    *,
    draws: Resamples,
    sampling: SamplingParams,
    count: int = NULLS,
    seed: int = 0,
    group: int = GROUP,
    progress: Progress | None = None,
) -> list[NullComparison | str]:
    """Each of `steered` beside `count` rotated nulls and `count` with the covariance of the
    unsteered states, at its own KL; or why there are none.

    Strength 1 is the plan as it is. `progress` is told of `null_steps` of 2 · `count` nulls for
    each. Raises `SteerError` as the engine does.
    """
    states: dict[tuple[Site, tuple[int, ...]], dict[int, Tensor]] = {}
    contenders: list[Contender] = []
    reasons: list[str | None] = []
    for one in steered:
        try:
            vector = measurable(engine, one.plan, count)
        except Unsupported as error:
            reasons.append(str(error))
            if progress is not None:
                progress(null_steps(len(prompts), 2 * count))
            continue
        at = (vector.card.site, vector.card.layers)
        if at not in states:
            states[at] = answer_states(engine, plain, *at)
        drawn = null_vectors(vector, count, seed=seed, states=states[at])
        contenders.append(Contender(one.plan, 1.0, one.answers, drawn))
        reasons.append(None)
    runs = run_nulls(
        engine,
        prompts,
        References(engine, plain),
        contenders,
        scorer,
        sampling=sampling,
        group=group,
        progress=progress,
    )
    compared = iter(
        compare(draws, plain, one, found) for one, found in zip(contenders, runs, strict=True)
    )
    return [next(compared) if reason is None else reason for reason in reasons]


def measurable(engine: Engine, plan: SteeringPlan, count: int) -> ControlVector:
    """The vector that nulls stand in for; raises `Unsupported` with why there are none."""
    if count == 0:
        raise Unsupported("no nulls were asked for", code="no_nulls")
    if not engine.capabilities.captures:
        raise Unsupported("this engine cannot read what a KL is measured on", code="no_captures")
    return added_vector(plan)


def told(found: NullComparison) -> str:
    """The comparison in a sentence, for people."""
    strongest = found.strongest
    if strongest is None or found.margin is None:
        return "no nulls were run, so it is not known whether chance does as much"
    kinds = ", ".join(dict.fromkeys(one.kind for one in found.nulls))
    missed = sum(not one.matched for one in found.nulls)
    verdict = (
        "it is above its nulls"
        if found.above_null
        else "NOT above its nulls: what it does is not called steering"
    )
    return (
        f"{verdict}: at KL {found.kl:.3g} the score is {found.score:.2f}, unsteered "
        f"{found.unsteered:.2f}, and that of the strongest of {len(found.nulls)} nulls ({kinds}) "
        f"{strongest.score:.2f} ({strongest.kind}, cosine {strongest.cosine:.2f}); margin "
        f"{found.margin.value:.2f} [{found.margin.low:.2f}, {found.margin.high:.2f}], "
        f"p = {found.p_value:.2g}" + (f"; {missed} of them did not reach that KL" if missed else "")
    )


def p_value(score: float, nulls: Sequence[float]) -> float:
    """The chance of a null at least as strong: (1 + nulls with a score ≥ `score`) / (1 + nulls).

    It is never below 1 / (1 + nulls): few nulls cannot say much.
    """
    return (1 + sum(one >= score for one in nulls)) / (1 + len(nulls))


def q_values(p: Sequence[float | None]) -> list[float | None]:
    """Of each p-value the least false discovery rate at which it is a discovery, where as many were
    looked at (Benjamini and Hochberg 1995); those that are None are not counted.

    Exact for tests that are independent or depend positively, as those against the same nulls do.
    """
    known = [one for one in p if one is not None]
    found = iter(false_discovery_control(known).tolist() if known else ())
    return [None if one is None else float(next(found)) for one in p]


def wrong_way(draws: Resamples, before: Sequence[float], after: Sequence[float]) -> Interval:
    """The share of prompts whose score fell from `before` to `after` (2407.12404); prompts that
    were not judged on both sides (NaN) do not count."""
    change = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    return draws.mean(np.where(np.isnan(change), np.nan, change < 0).tolist())


def anti_steered(
    draws: Resamples, strengths: Sequence[float], scores: Sequence[Sequence[float]]
) -> Interval:
    """The share of prompts that are steered the wrong way (2407.12404): those whose least-squares
    line of score over strength falls.

    `scores[n]` are those of all prompts at `strengths[n]`; NaN, where one was not judged, is left
    out of its prompt's line, and a prompt with fewer than two scores does not count.
    """
    x = np.asarray(strengths, dtype=np.float64)[:, None]
    y = np.asarray(scores, dtype=np.float64)
    known = ~np.isnan(y)
    count = known.sum(0)
    centred = np.where(known, x - (x * known).sum(0) / np.maximum(count, 1), 0.0)
    slope = (centred * np.where(known, y, 0.0)).sum(0)
    falls = np.where(count < 2, np.nan, slope < -1e-12)
    return draws.mean(falls.tolist())


def values(answers: Sequence[Answer]) -> list[float]:
    """The score of each answer; NaN where it was not judged."""
    return [one.score.value if one.score.judged else math.nan for one in answers]


def on_card(interval: Interval) -> MeasuredInterval:
    """The interval in six digits, as cards and reports hold it."""
    return MeasuredInterval(
        value=_rounded(interval.value), low=_rounded(interval.low), high=_rounded(interval.high)
    )


def _rounded(value: float) -> float:
    """As on every card; 0 for the mean of nothing, as in `Measured`."""
    return 0.0 if math.isnan(value) else rounded(value) or 0.0
