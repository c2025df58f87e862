"""Which layers, which tokens and which strength: chosen by what the answers do.

How well a layer tells two classes of states apart says little about whether steering there does
anything. So every use in a grid is tried on questions that the vector was not made on, at
strengths of equal KL, all in shared batches. What each budget allows is set by the words
themselves: how far the instruction moves the model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

from steer.engines.base import Engine, SamplingParams
from steer.errors import SteerError
from steer.fit.data.pairs import Prompt
from steer.fit.data.where import WhereName
from steer.fit.make.asking import Asked
from steer.fit.make.contrast import Source
from steer.fit.make.obedience import said_kl
from steer.fit.make.trials import PlansOfUses, Trial, Use, pooled, sound_trials, trial_of
from steer.fit.measure.answers import GROUP, Answer, Progress, answers_under, measured
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.matching import matched_strengths
from steer.fit.measure.scoring import AnswerScorer, Scorer

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

RUN_OFF = 3
"""How many trials are run again on more questions, where there are any: of several that are each
read on a dozen, the best is partly so by luck."""

MAY_BE_SOUND = 0.8
"""The share of sound answers, on a dozen questions, of a trial that may be sound on more."""

SLACK = 0.1
"""What a trial's `both` may fall short of the highest: on so few questions it is no difference, and
the farther the model is moved, the more does chance, and the less is left of everything else."""

_MATCHED_ANSWERS = 4
_MATCHED_TOKENS = 24
"""What KLs are read on while trials are chosen, of the answers and of each."""

_SPANS = ((0.15, 0.4), (0.3, 0.55), (0.45, 0.7), (0.6, 0.85), (0.25, 0.75))
"""Runs of layers that are tried, as shares of the depth; one layer alone seldom does anything."""


@dataclass(frozen=True)
class Choice:
    """The trial that was chosen, and all of them in the order in which they were run; `run_off` are
    those that were run again, with what they did on all questions together."""

    best: Trial
    trials: tuple[Trial, ...]
    run_off: tuple[Trial, ...] = ()


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
    plans: PlansOfUses,
    uses: Sequence[Use],
    *,
    wheres: Sequence[WhereName] = ("onward",),
    more: Sequence[Prompt] = (),
) -> Choice:
    """The use and strength of the sound trial that moves the model least, among those whose `both`
    is within `SLACK` of the highest. The best of `uses` is also tried on the tokens of `wheres`.
    Where there are `more` questions, the best trials are run on these too, and the choice among
    them is made on all.

    Raises `SteerError` (`no_sound_use`) where steering breaks the text in every trial.
    """
    few = replace(ground, prompts=ground.prompts[:COARSE_QUESTIONS])
    coarse = _tried(few, plans, [(use, COARSE) for use in uses])
    kept = [one.use for one in sorted(coarse, key=lambda one: -one.both)[:KEPT]]
    fine = _tried(ground, plans, [*_finer(kept, wheres)])
    if not sound_trials(fine, WANTED_VALID):
        # Words that move a model far allow too much; this is seldom, and counted by nobody.
        quiet = replace(ground, progress=None)
        gentle = _tried(quiet, plans, [(use, budget) for use in kept for budget in GENTLE])
        fine = [*fine, *gentle]
    sound, wanted = sound_trials(fine, MIN_VALID), sound_trials(fine, WANTED_VALID)
    first = _least([one for one in _good(sound) if one in wanted] or _good(sound))
    again = _run_off(ground, plans, first, sound_trials(fine, MAY_BE_SOUND), more)
    settled = _least(_good([one for one in again if one.valid >= MIN_VALID - 1e-9]))
    best = settled or (max(again, key=lambda one: one.valid) if first and again else first)
    if best is None:
        raise SteerError(
            f"in none of {len(fine)} trials were {MIN_VALID:.0%} of the steered answers sound: "
            "make it with other words, more questions, or for a larger model",
            code="no_sound_use",
        )
    return Choice(best, (*coarse, *fine), again)


def _good(sound: Sequence[Trial]) -> list[Trial]:
    """Those whose `both` is within `SLACK` of the highest."""
    highest = max((one.both for one in sound), default=0.0)
    return [one for one in sound if one.both >= highest - SLACK]


def _least(trials: Sequence[Trial]) -> Trial | None:
    """The one that moves the model least."""
    return min(trials, key=lambda one: (one.kl, -one.both), default=None)


def _run_off(
    ground: Ground,
    plans: PlansOfUses,
    first: Trial | None,
    others: Sequence[Trial],
    more: Sequence[Prompt],
) -> tuple[Trial, ...]:
    """`first` and the best of the `others`, run again on `more` questions: what each did on these
    and on the ground's together."""
    ranked = sorted((one for one in others if one is not first), key=lambda one: -one.both)
    chosen = [*([] if first is None else [first]), *ranked][: RUN_OFF if more else 0]
    everything = answers_under(
        ground.engine,
        [more] * len(chosen),
        [plans.plan(one.use, one.strength) for one in chosen],
        ground.scorer,
        sampling=ground.sampling,
        group=GROUP,
        progress=ground.progress,
    )
    if ground.progress is not None and len(chosen) < RUN_OFF:
        ground.progress((RUN_OFF - len(chosen)) * len(more))
    share = len(more) / max(len(more) + len(ground.prompts), 1)
    return tuple(
        pooled(one, trial_of(one.use, one.budget, one, measured(answers, examples=1)), share)
        for one, answers in zip(chosen, everything, strict=True)
    )


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


def steps(uses: int, prompts: int, wheres: int = 1, more: int = 0) -> int:
    """How much `choose` tells `progress` of: every strength that was matched, and every answer."""
    fine = len(FINE) * min(KEPT, uses) + wheres * (len(FINE) - 1)
    coarse = uses * (1 + min(COARSE_QUESTIONS, prompts))
    return coarse + fine * (1 + prompts) + RUN_OFF * more


def _tried(ground: Ground, plans: PlansOfUses, jobs: Sequence[tuple[Use, float]]) -> list[Trial]:
    """Every use at its budget, in shared batches."""
    budgets = [budget * ground.said_kl for _, budget in jobs]
    plans_at = [partial(plans.plan, use) for use, _ in jobs]
    matches = matched_strengths(
        ground.references,
        plans_at,
        budgets,
        start=[
            plans.likely_strength(use, budget)
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
        trial_of(use, budget, match, measured(answers, examples=1))
        for (use, _), budget, match, answers in zip(jobs, budgets, matches, everything, strict=True)
    ]


def _run(layers: Sequence[int], span: tuple[float, float]) -> tuple[int, ...]:
    low, high = (math.floor(share * len(layers)) for share in span)
    return tuple(layers[low : max(high, low + 1)])
