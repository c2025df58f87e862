"""What a subject's state says of the subject (2401.06102 §4.2), and of two hops (§5)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.inspection.facts import (
    BOTH_HOPS,
    CAPITAL,
    COUNTRIES,
    HOP,
    LANGUAGE,
    SOURCE,
    answered,
    first_token,
    prompts,
)
from benchmarks.inspection.readings import (
    Curve,
    Reader,
    Tokens,
    last_states,
    patched,
    said_of,
    shifted,
)
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.inspection.patchscopes.target import TargetPrompt, encode_target

LEAST_FACTS = 10


@dataclass(frozen=True)
class Question:
    """Facts that the model knows: the state of each of `sources`' last token goes to the x of
    `target`, and should make it say the answer. `texts` ask in words instead."""

    title: str
    sources: list[Tokens]
    target: str
    answers: list[str]
    texts: list[Tokens]
    asked: int


def questions(engine: Engine) -> list[Question]:
    """The facts of each kind that the model knows. Raises `SteerError` where it knows few."""
    found = []
    for title, template, field in (
        ("capital", CAPITAL, "capital"),
        ("language", LANGUAGE, "language"),
    ):
        names = [one.name for one in COUNTRIES]
        answers = [getattr(one, field) for one in COUNTRIES]
        known = _where(answered(engine, template, names, answers), names, answers)
        asked, said = [name for name, _ in known], [answer for _, answer in known]
        sources, texts = prompts(engine, SOURCE, asked), prompts(engine, template, asked)
        found.append(Question(title, sources, template, said, texts, len(COUNTRIES)))
    found.append(_two_hops(engine))
    for one in found:
        if len(one.answers) < LEAST_FACTS:
            raise SteerError(
                f"{one.title}: the model knows {len(one.answers)} of {one.asked} facts, and fewer "
                f"than {LEAST_FACTS} say nothing",
                code="not_known",
            )
    return found


def _two_hops(engine: Engine) -> Question:
    """The capital of the country that a city is in, where the model knows both hops."""
    cities, countries = [one.city for one in COUNTRIES], [one.name for one in COUNTRIES]
    capitals = [one.capital for one in COUNTRIES]
    first = answered(engine, HOP, cities, countries)
    second = answered(engine, CAPITAL, countries, capitals)
    both = [one and other for one, other in zip(first, second, strict=True)]
    known = _where(both, cities, capitals)
    names, answers = [city for city, _ in known], [capital for _, capital in known]
    return Question(
        "two hops: city, country, capital",
        prompts(engine, HOP, names),
        CAPITAL,
        answers,
        prompts(engine, BOTH_HOPS, names),
        len(COUNTRIES),
    )


def _where(
    known: Sequence[bool], names: Sequence[str], answers: Sequence[str]
) -> list[tuple[str, str]]:
    return [(n, a) for one, n, a in zip(known, names, answers, strict=True) if one]


def measure(engine: Engine, question: Question, goals: Mapping[int, int]) -> list[Curve]:
    """precision@1 of the answer's first token by the layer that is read; `goals` say where each
    layer's state is put."""
    layers = list(goals)
    states, _ = last_states(engine, question.sources, layers)
    wanted = [first_token(engine, answer) for answer in question.answers]
    given = TargetPrompt(text=question.target.format("x"), placeholder=" x")
    target, place = encode_target(engine, "custom", given)
    found = Reader(wanted)
    for name, rows in (("patchscope", states), ("shuffled state", shifted(states))):
        found.add_answers(name, layers, patched(engine, target.ids, place, rows, wanted, goals))
    found.add_answers("text only", [0], said_of(engine, question.texts, wanted))
    plain = said_of(engine, [target.ids] * len(wanted), wanted)
    found.add_answers("no state", [0], plain)
    return found.curves
