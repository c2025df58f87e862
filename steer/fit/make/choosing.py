"""Which layers, which tokens and which strength: chosen by what the answers do.

How well a layer tells two classes of states apart says little about whether steering there does
anything. So every use in a grid is tried on questions that the vector was not made on, at
strengths of equal KL, all in shared batches. What each budget allows is set by the words
themselves: how far the instruction moves the model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from scipy.optimize import isotonic_regression

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.fit.data.pairs import Prompt
from steer.fit.data.where import WHERES, WhereName
from steer.fit.make.asking import Asked
from steer.fit.make.contrast import Source
from steer.fit.make.obedience import said_kl
from steer.fit.measure.answers import GROUP, Answer, Measured, Progress, answers_under, measured
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.matching import Match, matched_strengths
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

COARSE = 2.0
"""The budget at which the whole grid is tried, in multiples of the instruction's own KL."""

COARSE_QUESTIONS = 8
"""The questions that the whole grid is tried on; the best uses are tried on all."""

FINE = (1.0, 2.0, 3.0, 4.5)
"""The budgets at which the best uses are tried."""

GENTLE = (0.5, 0.25)
"""The budgets that are tried where none of `FINE` leaves the text as sound as is wanted."""

KEPT = 2
"""How many uses go on from the coarse grid to the fine one."""

WANTED_VALID = 0.95
"""The share of sound answers that is looked for: higher than what is held to, because it is the
best of several that is chosen, each read on a dozen questions. Of trials on SmolLM2 that were
chosen with 11 of 12 sound, none had nine tenths on other questions."""

MIN_VALID = 0.9
"""A trial with a smaller share of sound answers is not chosen."""

SLACK = 0.1
"""What a trial's `both` may fall short of the highest: on so few questions it is no difference, and
the farther the model is moved, the more does chance, and the less is left of everything else."""

_MATCHED_ANSWERS = 4
_MATCHED_TOKENS = 24
"""What KLs are read on while trials are chosen, of the answers and of each."""

_SPANS = ((0.15, 0.4), (0.3, 0.55), (0.45, 0.7), (0.6, 0.85), (0.25, 0.75))
"""Runs of layers that are tried, as shares of the depth; one layer alone seldom does anything."""


@dataclass(frozen=True)
class Use:
    """A way to use what was read: which reading, on which layers, on which tokens."""

    source: Source
    layers: tuple[int, ...]
    where: WhereName


@dataclass(frozen=True)
class Trial:
    """A use at the strength whose KL in nats came nearest to `budget`, and what it did. `valid` and
    `score` are the means over the answers; `both` counts those that are not sound as 0."""

    use: Use
    budget: float
    strength: float
    kl: float
    score: float
    valid: float
    both: float
    example: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Choice:
    """The trial that was chosen, and all of them in the order in which they were run."""

    best: Trial
    trials: tuple[Trial, ...]


@dataclass(frozen=True)
class Ground:
    """What trials are run on: prompts, and how answers to them are scored.

    `said_kl` is the KL in nats of the instruction in words, `references` the unsteered answers that
    strengths are matched on.
    """

    engine: Engine
    prompts: Sequence[Prompt]
    scorer: AnswerScorer | Scorer
    references: References
    said_kl: float
    sampling: SamplingParams
    progress: Progress | None = None

    @staticmethod
    def of(
        engine: Engine,
        prompts: Sequence[Prompt],
        asked: Sequence[Asked],
        plain: Sequence[Answer],
        scorer: AnswerScorer | Scorer,
        sampling: SamplingParams,
        progress: Progress | None = None,
    ) -> Ground:
        """The ground of `prompts`, which are `asked` in three forms, with their unsteered answers:
        of the first of these the KLs are read."""
        references = References(engine, plain).first(_MATCHED_ANSWERS, _MATCHED_TOKENS)
        few = references.answers
        moved = said_kl(engine, asked[: len(few)], few)
        return Ground(engine, prompts, scorer, references, moved, sampling, progress)


def choose(
    ground: Ground,
    vectors: Mapping[Source, ControlVector],
    uses: Sequence[Use],
    *,
    wheres: Sequence[WhereName] = ("onward",),
) -> Choice:
    """The use and strength of the sound trial that moves the model least, among those whose `both`
    is within `SLACK` of the highest. The best of `uses` is also tried on the tokens of `wheres`.

    Raises `SteerError` (`no_sound_use`) where steering breaks the text in every trial.
    """
    few = replace(ground, prompts=ground.prompts[:COARSE_QUESTIONS])
    coarse = _tried(few, vectors, [(use, COARSE) for use in uses])
    kept = [one.use for one in sorted(coarse, key=lambda one: -one.both)[:KEPT]]
    fine = _tried(ground, vectors, [*_finer(kept, wheres)])
    if not sound_trials(fine, WANTED_VALID):
        # Words that move a model far allow too much; this is seldom, and counted by nobody.
        quiet = replace(ground, progress=None)
        gentle = _tried(quiet, vectors, [(use, budget) for use in kept for budget in GENTLE])
        fine = [*fine, *gentle]
    sound, wanted = sound_trials(fine, MIN_VALID), sound_trials(fine, WANTED_VALID)
    if not sound:
        raise SteerError(
            f"in none of {len(fine)} trials were {MIN_VALID:.0%} of the steered answers sound: "
            "make it with other words, more questions, or for a larger model",
            code="no_sound_use",
        )
    enough = max(one.both for one in sound) - SLACK
    good = [one for one in sound if one.both >= enough]
    best = min([one for one in good if one in wanted] or good, key=lambda one: (one.kl, -one.both))
    return Choice(best, (*coarse, *fine))


def sound_trials(trials: Sequence[Trial], share: float) -> list[Trial]:
    """The trials in which that share of the answers is sound, their neighbours heard.

    Steering harder breaks no fewer answers: a share that rises with the KL is noise. So those of
    one use are smoothed to what falls with it (isotonic regression).
    """
    found = []
    for use in dict.fromkeys(one.use for one in trials):
        own = sorted((one for one in trials if one.use == use), key=lambda one: one.kl)
        smooth = isotonic_regression([one.valid for one in own], increasing=False).x
        found += [one for one, valid in zip(own, smooth, strict=True) if valid >= share - 1e-9]
    return found


def grid(
    layers: Sequence[int], sources: Sequence[Source], where: WhereName = "all"
) -> tuple[Use, ...]:
    """Every source on every run of layers, on the tokens `where`; runs that are the same on a model
    of few layers are tried once."""
    runs = dict.fromkeys(_run(layers, span) for span in _SPANS)
    return tuple(Use(source, run, where) for source in sources for run in runs)


def _finer(best: Sequence[Use], wheres: Sequence[WhereName]) -> Iterator[tuple[Use, float]]:
    """The best uses at every budget, and the very best also on other tokens."""
    for use in best:
        yield from ((use, budget) for budget in FINE)
    for where in wheres:
        yield from ((replace(best[0], where=where), budget) for budget in FINE[1:])


def with_use(vector: ControlVector, best: Trial, **provenance: Any) -> ControlVector:
    """The vector with the use of a trial as its default, and `provenance` added to its card's."""
    changes = {
        "default_layers": best.use.layers,
        "default_where": WHERES[best.use.where],
        "default_strength": float(f"{best.strength:.4g}"),
        "provenance": {**vector.card.provenance, **provenance, "chosen_by": "effect"},
    }
    return replace(vector, card=vector.card.model_copy(update=changes))


def plan_of(engine: Engine, vector: ControlVector, use: Use, strength: float) -> SteeringPlan:
    """`vector` added at `strength`, as `use` says."""
    where = WHERES[use.where]
    item: dict[str, Any] = {
        "kind": "add",
        "vector": "made",
        "layers": list(use.layers),
        "strength": strength,
    }
    if where is not None:
        item["where"] = where
    return plans_of(engine, MemoryLibrary({"made": vector})).plan(
        parse_spec({"interventions": [item]})
    )


def steps(uses: int, prompts: int, wheres: int = 1) -> int:
    """How much `choose` tells `progress` of: every strength that was matched, and every answer."""
    fine = len(FINE) * min(KEPT, uses) + wheres * (len(FINE) - 1)
    return uses * (1 + min(COARSE_QUESTIONS, prompts)) + fine * (1 + prompts)


def _tried(
    ground: Ground, vectors: Mapping[Source, ControlVector], jobs: Sequence[tuple[Use, float]]
) -> list[Trial]:
    """Every use at its budget, in shared batches."""
    budgets = [budget * ground.said_kl for _, budget in jobs]
    plans_at = [_plan_at(ground.engine, vectors[use.source], use) for use, _ in jobs]
    matches = matched_strengths(
        ground.references,
        plans_at,
        budgets,
        start=[
            likely_strength(vectors[use.source], use.layers, budget)
            for (use, _), budget in zip(jobs, budgets, strict=True)
        ],
        tolerance=0.2,
        most_reads=2,
        progress=ground.progress,
    )
    everything = answers_under(
        ground.engine,
        [ground.prompts] * len(jobs),
        [at(match.strength) for at, match in zip(plans_at, matches, strict=True)],
        ground.scorer,
        sampling=ground.sampling,
        group=GROUP,
        progress=ground.progress,
    )
    return [
        _trial(use, budget, match, measured(answers, examples=1))
        for (use, _), budget, match, answers in zip(jobs, budgets, matches, everything, strict=True)
    ]


def likely_strength(vector: ControlVector, layers: Sequence[int], kl: float) -> float:
    """About the strength at which the vector, on `layers`, moves the model by `kl` nats: the search
    starts there.

    Half a root of the KL, as shares of the states' norms summed over the layers: found on one small
    model (at .4 nats, .28 to .34 for every source and run of layers), and only a beginning.
    """
    shares = [
        float(vector[layer].norm()) / norm
        for layer in layers
        if (norm := vector.card.measures[layer].residual_norm)
    ]
    return 0.47 * math.sqrt(kl) / sum(shares) if sum(shares) > 0 else 1.0


def _trial(use: Use, budget: float, match: Match, figures: Measured) -> Trial:
    valid = 1.0 if figures.valid is None else figures.valid
    return Trial(
        use=use,
        budget=budget,
        strength=match.strength,
        kl=match.kl,
        score=figures.score,
        valid=valid,
        both=figures.score if figures.both is None else figures.both,
        example=figures.examples[0],
    )


def _plan_at(engine: Engine, vector: ControlVector, use: Use) -> Callable[[float], SteeringPlan]:
    return lambda strength: plan_of(engine, vector, use, strength)


def _run(layers: Sequence[int], span: tuple[float, float]) -> tuple[int, ...]:
    low, high = (math.floor(share * len(layers)) for share in span)
    return tuple(layers[low : max(high, low + 1)])
