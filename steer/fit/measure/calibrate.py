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

from steer.artefacts.calibration import AUTO_EFFECT, Calibration, SafeLimits
from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.fit.data.pairs import Prompt
from steer.fit.measure.answers import GROUP, Answer, Progress, answers_under, measured
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.divergence import BATCH, References, divergences
from steer.fit.measure.doses import DIGITS, measured_doses, tabulated
from steer.fit.measure.nulls.comparison import anti_steered, compare, on_card, values
from steer.fit.measure.nulls.directions import NullVector, Refit, answer_states, null_vectors
from steer.fit.measure.nulls.runs import (
    NULLS,
    Contender,
    ContenderRuns,
    null_steps,
    run_nulls,
)
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.prompts import prompt_json
from steer.spec import Where, parse_spec

GRID = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.2, 1.4, 1.6, 1.8, 2.0)
"""The strengths that are measured unless others are given, in multiples of the card's default."""


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
    nulls: int = NULLS,
    refit: Refit | None = None,
    batch: int = BATCH,
    examples: int = 1,
    group: int = GROUP,
    progress: Progress | None = None,
) -> CalibratedVector:
    """Measures `vector` on `prompts` at every strength, and finds its calibrated range.

    `layers` and `where` are the card's unless given; where they are given they become the defaults
    of the calibrated version, because its tables hold for them alone. Without a `scorer` only KL
    and perplexity are measured, and no effect is known.

    Where one is known, it is compared with that of `nulls` vectors of chance of each kind
    (`steer.fit.measure.nulls`) at the same KL: rotated ones, ones with the covariance of the
    unsteered answers' states, and with `refit` those fitted on shuffled labels. `progress` is told
    of finished steps, `steps_of` in all; what it raises ends the work.

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
        scorer,
        sampling=sampling,
        group=group,
        progress=progress,
    )
    references = References(engine, everything[0], batch=batch)
    kl = references.divergences(plans, progress=progress).mean(1).tolist()
    figures = [measured(answers, examples=examples) for answers in everything]
    doses = measured_doses((0.0, *grid), figures, (0.0, *kl), scored=scorer is not None)
    used = tuple(sorted(set(layers))) if layers is not None else vector.card.used_layers
    calibration = tabulated(
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
    if scorer is not None and calibration.effect is not None:
        place = next(n for n, share in enumerate(calibration.effect) if share >= AUTO_EFFECT)
        drawn = _nulls(engine, vector, everything[0], used, count=nulls, seed=seed, refit=refit)
        contender = Contender(plans[place - 1], grid[place - 1], everything[place], drawn)
        [runs] = run_nulls(
            engine,
            prompts,
            references,
            [contender],
            scorer,
            sampling=sampling,
            group=group,
            progress=progress,
        )
        calibration = _beside_chance(calibration, everything, contender, runs)
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


def _beside_chance(
    calibration: Calibration,
    everything: Sequence[Sequence[Answer]],
    contender: Contender,
    runs: ContenderRuns,
) -> Calibration:
    """The calibration with its nulls, and the share of prompts steered the wrong way; `everything`
    are the answers at its doses."""
    draws = Resamples.draw(len(everything[0]), seed=calibration.seed)
    scores = [values(answers) for answers in everything[: len(calibration.kl)]]
    wrong = anti_steered(draws, calibration.strengths, scores)
    nulls = compare(draws, everything[0], contender, runs)
    return calibration.model_copy(update={"nulls": nulls, "anti_steered": on_card(wrong)})


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


def steps_of(
    prompts: Sized,
    strengths: Sequence[float] | None = None,
    *,
    nulls: int = NULLS,
    shuffled: bool = False,
) -> int:
    """How much `calibrate` tells `progress` of: every answer, every answer read again, and, with a
    scorer, `nulls` of each kind (`shuffled` too where there is a refit)."""
    doses = len(GRID if strengths is None else set(strengths))
    return len(prompts) * (2 + doses) + null_steps(len(prompts), nulls * (3 if shuffled else 2))


def _nulls(
    engine: Engine,
    vector: ControlVector,
    plain: Sequence[Answer],
    layers: Sequence[int],
    *,
    count: int,
    seed: int,
    refit: Refit | None,
) -> tuple[NullVector, ...]:
    """`count` nulls of each kind for `vector` on `layers`."""
    if count == 0:
        return ()
    states = answer_states(engine, plain, vector.card.site, layers)
    return null_vectors(vector, count, seed=seed, layers=layers, states=states, refit=refit)


def prompts_sha256(prompts: Sequence[Prompt]) -> str:
    """The hash of the prompts as JSON lines."""
    lines = [
        json.dumps(prompt_json(prompt), ensure_ascii=False, sort_keys=True) + "\n"
        for prompt in prompts
    ]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


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
        return tuple(float(f"{unit * factor:.{DIGITS}g}") for factor in GRID)
    chosen = tuple(sorted({float(strength) for strength in strengths}))
    if not chosen or not all(0 < strength < math.inf for strength in chosen):
        raise SteerError(
            f"{list(strengths)!r} cannot be calibrated: give strengths above 0; for the other "
            "direction, calibrate the negated vector",
            code="invalid_option",
            param="/strengths",
        )
    return chosen


def mean_kl(
    engine: Engine,
    answers: Sequence[Answer],
    plan: SteeringPlan,
    *,
    batch: int = BATCH,
) -> list[float]:
    """The KL in nats of `plan` on each unsteered answer; checks a calibration on other prompts."""
    return [float(value) for value in divergences(engine, answers, [plan], batch=batch)[0]]
