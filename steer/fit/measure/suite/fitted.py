"""Ways to steer that a suite fits itself, each concept's from the model's own answers.

For every concept the model answers shipped questions, none of them the suite's, with the concept's
instruction and without. All methods are fitted on these answers, on the same layers, and factor 1
is the strength at which a method moves the model by `REACH` nats, so that factors mean the same for
all.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TypeAlias

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine, SamplingParams
from steer.engines.plans import plans_of
from steer.errors import SteerError
from steer.fit.data.instruction import Telling
from steer.fit.data.pairs import Pair, PairSet
from steer.fit.data.preferences import Preference, PreferenceSet, Side
from steer.fit.data.prompt import Prompt, prompt_json
from steer.fit.make.questions import neutral_questions
from steer.fit.measure.answers import Answer, Progress, answers_under
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.matching import PlanAt, matched_strength
from steer.fit.measure.suite.file import Suite, SuiteConcept
from steer.fit.measure.suite.kept import write_whole
from steer.fit.measure.suite.way import Way, WayOf
from steer.fit.methods.fitting import fit
from steer.fit.methods.linear.psr import fit_psr
from steer.fit.methods.trained.low_rank import fit_low_rank
from steer.fit.methods.trained.reps import fit_reps
from steer.plan.plan import SteeringPlan
from steer.prompts import Marked
from steer.spec import parse_spec

QUESTIONS = 24
"""Questions that are answered for a concept."""

REACH = 0.5
"""Nats at factor 1."""

STEPS, BATCH = 40, 4
"""Training batches of the methods that are trained."""

_SPAN = (0.4, 0.65)
"""The layers, as shares of the depth; of a run of these the closed forms take all."""

_MATCHED_ANSWERS, _MATCHED_TOKENS = 4, 24

_CUT: frozenset[Side] = frozenset({"chosen", "rejected"})
_NAME = "fitted"
_ADD = {"kind": "add", "vector": _NAME}
_LOW_RANK = {"kind": "low_rank", "adapter": _NAME}

Fit: TypeAlias = ControlVector | LowRankAdapter


@dataclass(frozen=True)
class Lesson:
    """The model's answers to questions with a concept's instruction, and without."""

    engine: Engine
    telling: Telling
    layers: tuple[int, ...]
    answered: PreferenceSet

    @property
    def middle(self) -> tuple[int]:
        """The one layer of methods that act on one."""
        return (self.layers[len(self.layers) // 2],)

    def pairs(self) -> PairSet:
        """Both answers after the question as it is."""
        return PairSet.of(
            [
                Pair(_answered(one.prompt, one.chosen), _answered(one.prompt, one.rejected))
                for one in self.answered.items
            ]
        )


def _from_pairs(method: str) -> Callable[[Lesson], Fit]:
    return lambda lesson: fit(
        lesson.engine,
        lesson.pairs(),
        name=_NAME,
        method=method,
        layers=lesson.layers,
        positions="response",
        where="all",
        best=len(lesson.layers),
        held_out=0.0,
    )


def _psr(lesson: Lesson) -> Fit:
    return fit_psr(
        lesson.engine,
        lesson.answered,
        name=_NAME,
        instruction=lesson.telling.text,
        place=lesson.telling.place,
        layers=lesson.middle,
        held_out=0.0,
    )


def _reps(lesson: Lesson) -> Fit:
    return fit_reps(
        lesson.engine,
        lesson.answered,
        name=_NAME,
        layers=lesson.middle,
        steps=STEPS,
        batch=BATCH,
    )


def _low_rank(lesson: Lesson) -> Fit:
    return fit_low_rank(
        lesson.engine,
        lesson.answered.exercises(),
        name=_NAME,
        layers=lesson.middle,
        where="onward",
        steps=STEPS,
        batch=BATCH,
    )


FITS: Mapping[str, Callable[[Lesson], Fit]] = MappingProxyType(
    {
        "diffmean": _from_pairs("diffmean"),
        "logistic": _from_pairs("logistic"),
        "pca": _from_pairs("pca"),
        "psr": _psr,
        "reps": _reps,
        "low-rank": _low_rank,
    }
)
"""The methods by name."""

TRAINED = frozenset({"reps", "low-rank"})
"""Those that need gradients."""

ADAPTERS = frozenset({"psr", "low-rank"})
"""Those that make an adapter, and no vector."""


def fit_steps(concepts: int, fits: int) -> int:
    """How much fitting tells `progress` of: every answer, and every fit."""
    return (QUESTIONS * (1 + concepts) + concepts * fits) if fits else 0


@dataclass(frozen=True)
class SuiteFitter:
    """Fits for the concepts of `suite` on `engine`, on the answers to `questions`. What it fits is
    kept in `folder`, and taken from there where it was fitted in the same way."""

    engine: Engine
    suite: Suite
    questions: Sequence[Prompt]
    seed: int = 0
    folder: Path | None = None
    progress: Progress | None = None
    _lessons: dict[str, Lesson] = field(default_factory=dict)

    def way_of(self, method: str) -> WayOf:
        """The method of that name in `FITS`, fitted for the concept that is asked for."""

        def way(concept: SuiteConcept) -> Way:
            at = _turned(self.engine, self._fitted(method, concept))
            return Way(at(1.0), at)

        return way

    def _fitted(self, method: str, concept: SuiteConcept) -> Fit:
        """The artefact, with the strength of factor 1 as its card's."""
        path = self._path(method, concept)
        if path is not None and path.is_file():
            kind = LowRankAdapter if method in ADAPTERS else ControlVector
            return kind.from_bytes(path.read_bytes(), name=_NAME)
        found = self._reaching(FITS[method](self._lesson(concept)))
        if path is not None:
            write_whole(path, found.to_bytes())
        if self.progress is not None:
            self.progress(1)
        return found

    def _reaching(self, made: Fit) -> Fit:
        """It with the strength at which it moves the model by `REACH` nats, or comes nearest; the
        card says by how many it does."""
        references = References(self.engine, self._plain).first(_MATCHED_ANSWERS, _MATCHED_TOKENS)
        match = matched_strength(references, _turned(self.engine, made), REACH)
        changes = {
            "default_strength": float(f"{match.strength:.6g}"),
            "provenance": {**made.card.provenance, "kl": round(match.kl, 4)},
        }
        return replace(made, card=made.card.model_copy(update=changes))

    def _lesson(self, concept: SuiteConcept) -> Lesson:
        if concept.name not in self._lessons:
            telling = Telling(concept.instruction, self.suite.place)
            told = self._answers([telling(one) for one in self.questions])
            rows = zip(self.questions, told, self._plain, strict=True)
            both = [
                Preference(one, a.text, b.text, _CUT)
                for one, a, b in rows
                if a.text and b.text and a.text != b.text
            ]
            if not both:
                raise SteerError(
                    f"the model answers as before when it is told {concept.instruction!r}, so "
                    f"there is nothing to fit {concept.name!r} on: say it in other words, or "
                    "elsewhere (the suite's 'place')",
                    code="no_difference",
                )
            lesson = Lesson(self.engine, telling, self._layers, PreferenceSet.of(both))
            self._lessons[concept.name] = lesson
        return self._lessons[concept.name]

    @cached_property
    def _plain(self) -> tuple[Answer, ...]:
        return self._answers(self.questions)

    @property
    def _layers(self) -> tuple[int, ...]:
        low, high = (int(share * self.engine.info.n_layers) for share in _SPAN)
        return tuple(range(low, max(high, low + 1)))

    def _answers(self, prompts: Sequence[Prompt]) -> tuple[Answer, ...]:
        sampling = SamplingParams(
            max_tokens=self.suite.max_tokens, temperature=0.0, seed=self.seed, logprobs=0
        )
        [found] = answers_under(
            self.engine,
            [prompts],
            [None],
            sampling=sampling,
            progress=self.progress,
        )
        return found

    def _path(self, method: str, concept: SuiteConcept) -> Path | None:
        """Where a fit is kept: its name tells all that it depends on."""
        if self.folder is None:
            return None
        asked = [
            self.engine.info.own_name,
            concept.instruction,
            self.suite.place,
            self.suite.max_tokens,
            [prompt_json(one) for one in self.questions],
            [REACH, STEPS, BATCH, _SPAN, self.seed],
        ]
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:12]
        return self.folder / "fitted" / f"{concept.name}-{method}-{key}.safetensors"


def _answered(prompt: Prompt, text: str | None) -> Prompt:
    assert not isinstance(prompt, Marked), "questions have no marks"
    return Marked(prompt, text or "")


def fit_questions(suite: Suite) -> tuple[str, ...]:
    """The shipped questions that fits are made on: the first that the suite does not ask."""
    asked = {json.dumps(one) for one in suite.prompts}
    free = [one for one in neutral_questions() if json.dumps(one) not in asked]
    return tuple(free[:QUESTIONS])


def _turned(engine: Engine, made: Fit) -> PlanAt:
    """The plan of what was fitted, by multiples of its card's strength."""
    if isinstance(made, LowRankAdapter):
        kind, library = _LOW_RANK, MemoryLibrary(low_ranks={_NAME: made})
    else:
        kind, library = _ADD, MemoryLibrary(vectors={_NAME: made})
    cache = plans_of(engine, library)

    def at(factor: float) -> SteeringPlan:
        strength = factor * made.card.default_strength
        return cache.plan(parse_spec({"interventions": [{**kind, "strength": strength}]}))

    return at
