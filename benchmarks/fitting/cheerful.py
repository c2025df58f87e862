"""Every method told to do the same, at the same KL, beside chance.

    python -m benchmarks.fitting.cheerful --model smollm2 diffmean act angular conceptor psr reps

The model answers questions told to be cheerful and told to be gloomy; each method is fitted on
these answers, and on questions that none was fitted on it is run at the strength whose KL is
`--kl`. So are 21 vectors of chance, in the place of the difference of means, which all rows share:
p is the share of them that score at least as high. The score is how much likelier the instruction
makes an answer (docs/making.md). What was answered is written down and not asked again.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.fitting.contenders import (
    LAYERS,
    METHODS,
    Contender,
    Material,
    adds,
    diffmean,
    preferences,
)
from steer.artefacts.control_vector import ControlVector
from steer.cli.local import running_engine
from steer.engines.base import Engine, SamplingParams
from steer.engines.journal import JournaledEngine
from steer.fit.make.asking import Interview
from steer.fit.make.contrast import AnswerPair, contrast_states
from steer.fit.make.obedience import InstructionScorer, obedience
from steer.fit.make.questions import neutral_questions
from steer.fit.make.wish import QuestionParts
from steer.fit.measure.answers import Answer, answers_under, mean, scored
from steer.fit.measure.bootstrap import Resamples
from steer.fit.measure.divergence import References
from steer.fit.measure.nulls.comparison import p_value, values, wrong_way
from steer.fit.measure.nulls.directions import null_vectors, refit_pairs
from steer.fit.measure.nulls.matching import (
    TOLERANCE,
    Match,
    PlanAt,
    matched_strength,
    matched_strengths,
)
from steer.plan.plan import SteeringPlan
from steer.prompts import Prompt

INSTRUCTION = "You are extremely cheerful and enthusiastic."
OPPOSITE = "You are extremely gloomy and sad."
JOY = (
    "joy|happ|delight|wonderful|great|amazing|fantastic|excit|love|fun|beautiful|awesome|glad|smile|"
    "cheer|thrill|perfect|enjoy|celebrat|laugh|bright|sunshine|yay|wow"
)
MATCHED_ANSWERS, MATCHED_TOKENS = 6, 24
SCALED_ON = 16


def main() -> None:
    given = _arguments()
    with running_engine(given.model, dtype=given.dtype) as engine:
        contest = Contest.of(engine, given.journal, given.kl, given.questions)
        contest.show_baselines()
        chance = contest.chance(given.nulls)
        for name in given.methods:
            for one in METHODS[name](contest.material):
                contest.show(one, chance)


@dataclass(frozen=True)
class Contest:
    """The questions that are held out, the unsteered answers to them, and how answers are scored.
    `engine` writes down what it was asked; fits work on that of `material`."""

    engine: Engine
    talk: Interview
    material: Material
    fitted: Sequence[AnswerPair]
    held_out: Sequence[Prompt]
    plain: Sequence[Answer]
    scorer: InstructionScorer
    references: References
    kl: float

    @staticmethod
    def of(engine: Engine, journal: Path, kl: float, questions: int) -> Contest:
        journal.parent.mkdir(parents=True, exist_ok=True)
        noted = JournaledEngine(engine, journal)
        sampling = SamplingParams(max_tokens=32, temperature=0.7, seed=0, logprobs=0)
        talk = Interview(noted, INSTRUCTION, OPPOSITE, sampling, place="after")
        asked = [[{"role": "user", "content": one}] for one in neutral_questions()]
        parts = QuestionParts.of(asked, 0)
        used = parts.fitted[:questions]
        scaled = used[:SCALED_ON]
        told, opposed, plain, before = talk.answers(
            [talk.told(one) for one in used],
            [talk.opposed(one) for one in used],
            parts.checked,
            scaled,
        )
        followed = obedience(
            noted,
            talk.asked(scaled),
            before,
            told[: len(scaled)],
            opposed[: len(scaled)],
            known=talk.asked([*used, *parts.checked]),
        )
        answered = preferences(used, [one.text for one in told], [one.text for one in opposed])
        scores = scored(noted, followed.scorer, plain)
        plain = tuple(replace(one, score=score) for one, score in zip(plain, scores, strict=True))
        return Contest(
            noted,
            talk,
            Material(engine, talk.told, answered),
            [AnswerPair(a, b) for a, b in zip(told, opposed, strict=True)],
            parts.checked,
            plain,
            followed.scorer,
            References(noted, plain).first(MATCHED_ANSWERS, MATCHED_TOKENS),
            kl,
        )

    def answers(self, plans: Sequence[SteeringPlan | None]) -> list[tuple[Answer, ...]]:
        """The scored answers to the questions held out under each plan."""
        return self._scored([self.held_out] * len(plans), plans)

    def chance(self, count: int) -> list[float]:
        """The scores of `count` vectors of each kind at this KL, in the vector's place."""
        vector = diffmean(self.material)
        states = contrast_states(self.engine, self.fitted, site="resid_post", layers=LAYERS)[
            "response"
        ]
        nulls = null_vectors(
            vector,
            count,
            states={n: _centred(*sides) for n, sides in states.items()},
            refit=refit_pairs(states),
        )
        plans_at = [_added(null.vector).plans(self.engine) for null in nulls]
        found = matched_strengths(
            self.references, plans_at, [self.kl] * len(nulls), start=[0.5] * len(nulls)
        )
        plans = [at(match.strength) for at, match in zip(plans_at, found, strict=True)]
        draws = Resamples.draw(len(self.held_out))
        scores = [draws.mean(values(said)).value for said in self.answers(plans)]
        for kind in dict.fromkeys(null.kind for null in nulls):
            mine = [n for n, null in enumerate(nulls) if null.kind == kind]
            told = ", ".join(f"{scores[n]:.2f}" for n in mine)
            reached = sum(found[n].reached for n in mine)
            print(f"chance, {kind}: {told}; {reached} of {len(mine)} reached the KL", flush=True)
        return scores

    def show_baselines(self) -> None:
        told = [self.talk.told(one) for one in self.held_out]
        [said] = self._scored([told], [None])
        print(
            "| method | at | KL | score | sound | joyful of 100 | wrong way | p | an answer |\n"
            "|---|---|---|---|---|---|---|---|---|"
        )
        self._row("unsteered", "", "", self.plain, "")
        self._row("in words", "", "", said, "")

    def show(self, one: Contender, chance: Sequence[float]) -> None:
        """The method's row."""
        plans_at = one.plans(self.engine)
        match = self._matched(one, plans_at)
        [said] = self.answers([plans_at(match.strength)])
        score = Resamples.draw(len(said)).mean(values(said)).value
        p = p_value(score, chance)
        kl = f"{match.kl:.2f}" + ("" if match.reached else " (nearest)")
        self._row(one.name, f"{match.strength:.3g}", kl, said, f"{p:.2g}")
        if one.fitted:
            print(f"<!-- {one.name}: {dict(one.fitted)} -->", flush=True)

    def _matched(self, one: Contender, plans_at: PlanAt) -> Match:
        if not one.dials:
            return matched_strength(self.references, plans_at, self.kl, start=one.start)
        nats = self.references.divergences([plans_at(dial) for dial in one.dials]).mean(1).tolist()
        dials = list(zip(one.dials, nats, strict=True))
        print(f"<!-- {one.name}: KL {', '.join(f'{d:g}: {n:.2f}' for d, n in dials)} -->")
        dial, found = min(dials, key=lambda pair: abs(pair[1] - self.kl))
        return Match(dial, found, len(nats), abs(found - self.kl) <= TOLERANCE * self.kl)

    def _scored(
        self, prompts: Sequence[Sequence[Prompt]], plans: Sequence[SteeringPlan | None]
    ) -> list[tuple[Answer, ...]]:
        return answers_under(self.engine, prompts, plans, self.scorer, sampling=self.talk.sampling)

    def _row(self, name: str, at: str, kl: str, said: Sequence[Answer], p: str) -> None:
        draws, scores = Resamples.draw(len(said)), values(said)
        cells = [
            name,
            at,
            kl,
            str(draws.mean(scores)),
            f"{mean([float(bool(one.score.valid)) for one in said]):.2f}",
            f"{joyful(one.text for one in said):.1f}",
            ""
            if name == "unsteered"
            else f"{wrong_way(draws, values(self.plain), scores).value:.2f}",
            p,
            said[0].text[:90].replace("\n", " ").replace("|", "\\|"),
        ]
        print(f"| {' | '.join(cells)} |", flush=True)


def joyful(texts: Iterable[str]) -> float:
    """Joyful words in a hundred."""
    words = [word for text in texts for word in re.findall(r"[\w']+", text.lower())]
    return 100 * sum(bool(re.match(JOY, word)) for word in words) / max(1, len(words))


def _added(vector: ControlVector) -> Contender:
    return Contender("chance", {"v": vector}, adds)


def _centred(told: Tensor, opposed: Tensor) -> Tensor:
    return torch.cat([told - told.mean(0), opposed - opposed.mean(0)])


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("methods", nargs="+", choices=tuple(METHODS))
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--dtype")
    parser.add_argument("--kl", type=float, default=0.6, help="nats of every row")
    parser.add_argument("--questions", type=int, default=48, help="that are fitted on")
    parser.add_argument("--nulls", type=int, default=7, help="of each of three kinds")
    parser.add_argument("--journal", type=Path, default=Path("build/fitting/cheerful.jsonl"))
    return parser.parse_args()


if __name__ == "__main__":
    main()
