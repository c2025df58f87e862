"""What is asked for in words, as a shipped vector's card says it, and how answers are scored.

The questions are parted as they were when the vector was made: features are looked for on those
that it was fitted on, their use is chosen where its use was, and the rest is held out for both.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from benchmarks.saes.setting import Setting
from steer.artefacts.control_vector import ControlVector
from steer.engines.base import SamplingParams
from steer.fit.make.asking import Interview
from steer.fit.make.obedience import Obedience, obedience
from steer.fit.make.questions import neutral_questions
from steer.fit.make.wish import QuestionParts
from steer.fit.measure.answers import Answer
from steer.fit.measure.calibrate import prompts_sha256
from steer.prompts import Prompt, as_chat

SCALED_ON = 16
NAMED = ("instruction", "opposite", "place", "seed", "temperature", "data_sha256")


@dataclass(frozen=True)
class Attribute:
    """A vector's instruction, the questions in their parts, the answers of the model that is told
    it and of the one that is told the opposite, and the scorer of answers."""

    name: str
    vector: ControlVector
    talk: Interview
    parts: QuestionParts
    held_out: tuple[Prompt, ...]
    told: tuple[Answer, ...]
    opposed: tuple[Answer, ...]
    followed: Obedience

    @staticmethod
    def of(setting: Setting, name: str, *, fitted: int, questions: int, tokens: int) -> Attribute:
        """Asks the model both ways, on `fitted` of the questions that the vector was fitted on.

        Raises `ValueError` for a vector that `steer make` did not make on the shipped questions, or
        where fewer than `questions` are held out.
        """
        engine, vector = setting.engine, setting.registry.vector(name)
        story: Mapping[str, Any] = vector.card.provenance
        asked: list[Prompt] = [as_chat(engine.tokenizer, one) for one in neutral_questions()]
        _check(name, story, prompts_sha256(asked))
        parts = QuestionParts.of(asked, story["seed"])
        used = parts.fitted[:fitted]
        held_out = unused(parts, asked, questions)
        sampling = SamplingParams(
            max_tokens=tokens, temperature=story["temperature"], seed=story["seed"], logprobs=0
        )
        talk = Interview(
            engine, story["instruction"], story["opposite"], sampling, place=story["place"]
        )
        scaled = used[:SCALED_ON]
        told, opposed, plain = talk.answers(
            [talk.told(one) for one in used],
            [talk.opposed(one) for one in used],
            scaled,
        )
        followed = obedience(
            engine,
            talk.asked(scaled),
            plain,
            told[: len(scaled)],
            opposed[: len(scaled)],
            known=talk.asked([*used, *parts.chosen, *parts.run_off, *held_out]),
        )
        return Attribute(
            name, vector, talk, replace(parts, fitted=used), held_out, told, opposed, followed
        )


def unused(parts: QuestionParts, asked: Sequence[Prompt], count: int) -> tuple[Prompt, ...]:
    """`count` questions that the vector was neither fitted nor chosen on: those of its check, and
    then those that nothing was done with. Raises `ValueError` where there are fewer."""
    used = [*parts.fitted, *parts.chosen, *parts.run_off]
    found = [*parts.checked, *(one for one in asked if one not in [*used, *parts.checked])]
    if len(found) < count:
        raise ValueError(
            f"{len(found)} questions are held out, and {count} are asked for: ask for fewer with "
            "--questions"
        )
    return tuple(found[:count])


def _check(name: str, story: Mapping[str, Any], sha256: str) -> None:
    missing = [part for part in NAMED if part not in story]
    if missing:
        raise ValueError(
            f"the card of the vector {name!r} does not say its {missing[0]}: name a vector that "
            "`steer make` made"
        )
    if story["data_sha256"] != sha256:
        raise ValueError(
            f"the vector {name!r} was made on other questions than those that ship, so which are "
            "held out is not known: name one that was made on those"
        )
