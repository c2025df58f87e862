"""Three concepts that a model can be told in words, and how its answers to questions are scored."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.cli.local import open_registry, running_engine
from steer.engines.base import Engine, SamplingParams
from steer.engines.journal import JournaledEngine
from steer.engines.plans import plans_of
from steer.fit.features.effect import EffectGround, EffectOptions, drawn_nulls
from steer.fit.make.asking import Interview
from steer.fit.make.obedience import InstructionScorer, obedience
from steer.fit.make.questions import neutral_questions, shuffled
from steer.fit.measure.answers import Answer, answers_under, scored
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.nulls.comparison import values
from steer.fit.measure.nulls.in_plans import with_vector
from steer.fit.measure.nulls.matching import PlanAt
from steer.plan.plan import SteeringPlan
from steer.prompts import Prompt
from steer.registry.registry import Registry
from steer.spec import parse_spec

LEARNT_ON, CHECKED_ON = 24, 20
"""Questions that features are chosen on, and others on which they are judged."""
SAMPLING = SamplingParams(max_tokens=32, temperature=0.7, seed=0, logprobs=0)


@dataclass(frozen=True)
class Told:
    """A concept in words; `name` is also that of the vector that was made of them."""

    name: str
    instruction: str
    opposite: str


CONCEPTS = (
    Told(
        "cheerful",
        "You are extremely cheerful and enthusiastic.",
        "You are extremely gloomy and sad.",
    ),
    Told(
        "academic",
        "You are extremely formal and academic.",
        "You are extremely casual and use slang.",
    ),
    Told(
        "story",
        "Answer with a personal story of your own, in the first person.",
        "Answer with facts alone, in an impersonal way.",
    ),
)


@dataclass(frozen=True)
class Place:
    """What is asked: the model, its artefacts, one SAE. `engine` writes down what it was asked."""

    engine: Engine
    library: Registry
    sae: SAE
    name: str

    def plan(self, *interventions: dict[str, object]) -> SteeringPlan:
        """The plan of a spec."""
        plans = plans_of(self.engine, self.library)
        return plans.plan(parse_spec({"interventions": list(interventions)}))

    def chance(self, ground: EffectGround, features: Sequence[int]) -> list[PlanAt]:
        """Directions that know nothing of `features`, where the SAE writes."""
        alone = plans_of(self.engine, MemoryLibrary(saes={"sae": self.sae}))
        clamp = {"kind": "clamp", "sae": "sae", "features": [features[0]], "mode": "add"}
        where = {"positions": [[-1, None]]}
        spec = {"interventions": [{**clamp, "value": 1.0, "where": where}]}
        base = alone.plan(parse_spec(spec))

        def at(n: int) -> PlanAt:
            return lambda strength: with_vector(base, drawn[n], strength)

        drawn = drawn_nulls(ground, features)
        return [at(n) for n in range(len(drawn))]


@dataclass(frozen=True)
class Asked:
    """A concept, the questions that are held out with the model's own answers to them, and how an
    answer is scored: how much likelier the words make it (`InstructionScorer`)."""

    told: Told
    talk: Interview
    held_out: Sequence[Prompt]
    plain: Sequence[Answer]
    in_words: Sequence[Answer]
    scorer: InstructionScorer

    @staticmethod
    def of(engine: Engine, told: Told) -> Asked:
        learnt, held_out = questions()
        talk = Interview(engine, told.instruction, told.opposite, SAMPLING, place="after")
        said, opposed, before, plain, in_words = talk.answers(
            [talk.told(one) for one in learnt],
            [talk.opposed(one) for one in learnt],
            learnt,
            held_out,
            [talk.told(one) for one in held_out],
        )
        known = talk.asked([*learnt, *held_out])
        scorer = obedience(engine, talk.asked(learnt), before, said, opposed, known=known).scorer
        return Asked(
            told,
            talk,
            held_out,
            with_scores(engine, scorer, plain),
            with_scores(engine, scorer, in_words),
            scorer,
        )

    def answers(self, plans: Sequence[SteeringPlan | None]) -> list[tuple[Answer, ...]]:
        """The scored answers to the questions held out, under each plan."""
        return answers_under(
            self.talk.engine,
            [self.held_out] * len(plans),
            plans,
            self.scorer,
            sampling=SAMPLING,
        )


def with_scores(
    engine: Engine, scorer: InstructionScorer, answers: Sequence[Answer]
) -> tuple[Answer, ...]:
    found = scored(engine, scorer, answers)
    return tuple(replace(one, score=score) for one, score in zip(answers, found, strict=True))


def questions() -> tuple[list[Prompt], list[Prompt]]:
    """Questions to learn from, and others to judge on."""
    asked: list[Prompt] = [[{"role": "user", "content": one}] for one in neutral_questions()]
    order = list(shuffled(asked, 0))
    return order[CHECKED_ON : CHECKED_ON + LEARNT_ON], order[:CHECKED_ON]


def ground_of(place: Place, answers: Sequence[Answer], kl: float, nulls: int) -> EffectGround:
    """Unsteered answers as what directions are raised on, to `kl` nats."""
    return EffectGround.along(place.engine, place.sae, answers, EffectOptions(kl=kl, nulls=nulls))


def told_score(answers: Sequence[Answer]) -> str:
    """The mean score with its interval, and the share of answers that are sound."""
    score = Resamples.draw(len(answers)).mean(values(answers))
    sound = sum(bool(one.score.valid) for one in answers) / len(answers)
    return f"{score} | {sound:.2f}"


@contextmanager
def asked_place(given: argparse.Namespace) -> Iterator[Place]:
    """What the arguments name."""
    torch.set_num_threads(given.threads)
    given.journal.parent.mkdir(parents=True, exist_ok=True)
    with (
        open_registry(given.registry, given.model) as library,
        running_engine(given.model, dtype=given.dtype) as engine,
    ):
        noted = JournaledEngine(engine, given.journal)
        yield Place(noted, library, library.sae(given.sae), given.sae)


def arguments(what: str, name: str) -> argparse.ArgumentParser:
    """Those that all of these commands have."""
    parser = argparse.ArgumentParser(description=what)
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--sae", default="resid-14")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--registry", default="build/features/registry")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--journal", type=Path, default=Path(f"build/features/{name}.jsonl"))
    return parser
