"""One concept of a suite: what every way to steer makes of it, and nulls beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from steer.artefacts.calibration import NullComparison
from steer.engines.base import Engine, SamplingParams
from steer.errors import Unsupported
from steer.fit.data.instruction import Telling
from steer.fit.data.prompt import Prompt
from steer.fit.measure.answers import Answer, Progress, answers_under, mean
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.evaluate import PROMPT_ONLY, UNSTEERED
from steer.fit.measure.nulls.comparison import compare, measurable
from steer.fit.measure.nulls.directions import answer_states, null_vectors
from steer.fit.measure.nulls.runs import Contender, ContenderRuns, null_steps, run_nulls
from steer.fit.measure.scoring import Score
from steer.fit.measure.suite.file import Suite, SuiteConcept
from steer.fit.measure.suite.rating import Panel, Rating
from steer.fit.measure.suite.result import ConceptResult, ConceptRow, RowKind
from steer.fit.measure.suite.way import Way
from steer.plan.plan import SteeringPlan


@dataclass(frozen=True)
class Turned:
    """A way to steer at one factor: its plan, its answers to all prompts, and their ratings."""

    method: str
    factor: float
    plan: SteeringPlan
    answers: Sequence[Answer] = ()
    ratings: Sequence[Rating] = ()

    def chosen_by(self) -> float:
        """The mean overall rating on the prompts that choose."""
        return mean([one.overall for one in self.ratings[::2]])


def concept_steps(suite: Suite, methods: int, nulls: int) -> int:
    """How much `ConceptBench.run` tells `progress` of: every answer, and the nulls."""
    count = len(suite.prompts)
    return count * (1 + methods * len(suite.factors)) + methods * null_steps(count // 2, 2 * nulls)


@dataclass(frozen=True)
class ConceptBench:
    """What the concepts of a run share; `plain` are the unsteered answers to `prompts`."""

    engine: Engine
    suite: Suite
    prompts: Sequence[Prompt]
    plain: Sequence[Answer]
    panel: Panel
    sampling: SamplingParams
    nulls: int
    seed: int
    group: int

    def asked(self, concept: SuiteConcept, ways: Mapping[str, Way]) -> list[Any]:
        """All that a concept's result depends on, as JSON."""
        return [
            self.suite.sha256,
            concept.model_dump(mode="json"),
            [[name, way.plan.fingerprint] for name, way in ways.items()],
            self.engine.info.own_name,
            self.panel.identity,
            self.nulls,
            self.seed,
        ]

    def run(
        self,
        concept: SuiteConcept,
        ways: Mapping[str, Way],
        progress: Progress | None,
    ) -> ConceptResult:
        """Rates `ways`, each turned by every factor, and the nulls of the best. Raises
        `SteerError`."""
        telling = Telling(concept.instruction, self.suite.place)
        cells = [one for name, way in ways.items() for one in self._turned(name, way)]
        asked, *steered = answers_under(
            self.engine,
            [list(map(telling, self.prompts)), *[self.prompts] * len(cells)],
            [None, *(one.plan for one in cells)],
            sampling=self.sampling,
            group=self.group,
            progress=progress,
        )
        if progress is not None:  # what cannot be turned has fewer answers
            whole = len(ways) * len(self.suite.factors)
            progress(len(self.prompts) * (whole - len(cells)))
        everywhere = range(len(self.prompts))
        plain, prompted, *rated = self._rated(concept, [self.plain, asked, *steered], everywhere)
        cells = [
            replace(one, answers=said, ratings=ratings)
            for one, said, ratings in zip(cells, steered, rated, strict=True)
        ]
        best = [_best([one for one in cells if one.method == name]) for name in ways]
        rows = [
            replace(
                _row(one.method, "steering", one.ratings, one.answers),
                factor=one.factor,
                chosen_from=tuple(
                    (each.factor, each.chosen_by()) for each in cells if each.method == one.method
                ),
            )
            for one in best
        ]
        return ConceptResult(
            concept.name,
            (
                _row(UNSTEERED, "unsteered", plain, self.plain),
                _row(PROMPT_ONLY, "prompt", prompted, asked),
                *self._beside_nulls(concept, rows, best, plain, progress),
            ),
        )

    def _turned(self, name: str, way: Way) -> list[Turned]:
        """The plan at each factor; what cannot be turned as it is alone."""
        if way.at is None:
            return [Turned(name, 1.0, way.plan)]
        return [Turned(name, factor, way.at(factor)) for factor in self.suite.factors]

    def _rated(
        self, concept: SuiteConcept, said: Sequence[Sequence[Answer]], places: Sequence[int]
    ) -> list[list[Rating]]:
        """The ratings of groups of answers, each to the prompts at `places`, asked for at once."""
        flat = [answer for answers in said for answer in answers]
        found = iter(self.panel.rate(concept, flat, [*places] * len(said)))
        return [[next(found) for _ in answers] for answers in said]

    def _beside_nulls(
        self,
        concept: SuiteConcept,
        rows: Sequence[ConceptRow],
        best: Sequence[Turned],
        plain: Sequence[Rating],
        progress: Progress | None,
    ) -> list[ConceptRow]:
        """The rows with what nulls at the KL of each chosen factor do on the held-out prompts."""
        prompts, unsteered = held_out(self.prompts), held_out(self.plain)
        contenders: list[Contender] = []
        found: list[ConceptRow | None] = []
        for row, one in zip(rows, best, strict=True):
            try:
                contenders.append(self._contender(one, unsteered))
                found.append(None)
            except Unsupported as error:
                found.append(replace(row, no_nulls=str(error)))
                if progress is not None:
                    progress(null_steps(len(prompts), 2 * self.nulls))
        runs = run_nulls(
            self.engine,
            prompts,
            References(self.engine, unsteered),
            contenders,
            None,
            sampling=self.sampling,
            group=self.group,
            progress=progress,
        )
        compared = iter(self._compared(concept, contenders, runs, plain))
        return [
            replace(row, nulls=next(compared)) if done is None else done
            for row, done in zip(rows, found, strict=True)
        ]

    def _compared(
        self,
        concept: SuiteConcept,
        contenders: Sequence[Contender],
        runs: Sequence[ContenderRuns],
        plain: Sequence[Rating],
    ) -> list[NullComparison]:
        """The contenders beside their nulls, by the overall rating."""
        said = [run.answers for one in runs for run in one.nulls]
        places = held_out(range(len(self.prompts)))
        ratings = iter(self._rated(concept, said, places))
        marked = [
            replace(
                one,
                nulls=tuple(
                    replace(run, answers=_marked(run.answers, next(ratings))) for run in one.nulls
                ),
            )
            for one in runs
        ]
        draws = Resamples.draw(len(places), seed=self.seed)
        before = _marked(held_out(self.plain), held_out(plain))
        return [
            compare(draws, before, contender, one)
            for contender, one in zip(contenders, marked, strict=True)
        ]

    def _contender(self, one: Turned, unsteered: Sequence[Answer]) -> Contender:
        """What nulls are held against; raises `Unsupported` where there are none."""
        vector = measurable(self.engine, one.plan, self.nulls)
        states = answer_states(self.engine, unsteered, vector.card.site, vector.card.layers)
        drawn = null_vectors(vector, self.nulls, seed=self.seed, states=states)
        return Contender(
            one.plan, 1.0, _marked(held_out(one.answers), held_out(one.ratings)), drawn
        )


def _best(cells: Sequence[Turned]) -> Turned:
    """The best on the prompts that choose; of equals the weakest, which changes least."""
    return max(cells, key=lambda one: (one.chosen_by(), -one.factor))


def _row(
    method: str, kind: RowKind, ratings: Sequence[Rating], answers: Sequence[Answer]
) -> ConceptRow:
    """What is rated of the answers to all prompts."""
    return ConceptRow(method, kind, tuple(held_out(ratings)), example=held_out(answers)[0].text)


def held_out(items: Sequence[Any]) -> Sequence[Any]:
    """Of items that are one for each prompt, those that choose no factor: every second one."""
    return items[1::2]


def _marked(answers: Sequence[Answer], ratings: Sequence[Rating]) -> list[Answer]:
    """The answers with their overall rating as the score."""
    return [
        replace(answer, score=Score(rating.overall))
        for answer, rating in zip(answers, ratings, strict=True)
    ]
