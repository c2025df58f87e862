"""Detectors on a model's own texts: what they tell apart, how often they fire for nothing, when.

A detector of requests is fitted on questions, one of a manner on answers that were told in words to
have it, beside unsteered ones to other questions: of one question's two answers, of which one is
fitted on and one is held out, a probe that has learnt the question would say the wrong one. Each is
then tried on questions of which it has seen nothing: their unsteered answers should not make it
fire, those that are told should, and soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Literal, NamedTuple

from benchmarks.fitting import prompts
from steer.artefacts.calibration import MeasuredInterval
from steer.artefacts.detector import Detector
from steer.engines.base import Engine, SamplingParams
from steer.fit import Labelled, LabelledSet
from steer.fit.data.instruction import Telling
from steer.fit.data.pairs import read_pairs
from steer.fit.make.questions import neutral_questions
from steer.fit.measure.answers import answers_under
from steer.fit.methods.detectors.fitting import ThresholdRule, fit_detector
from steer.fit.methods.linear.reading import positions_of
from steer.fit.states import make_reading, read_tokens
from steer.prompts import Prompt

RULES: tuple[ThresholdRule, ...] = ("false_positive_rate", "conformal")
RATE = 0.1
NEW = 0.3
"""The share of the questions that no detector is fitted on."""
Watched = Literal["all", "response"]


@dataclass(frozen=True)
class Case:
    """Texts with something and texts without, to fit on, and new ones of both sorts."""

    name: str
    tokens: Watched
    having: Sequence[Prompt]
    lacking: Sequence[Prompt]
    new_having: Sequence[Prompt]
    new_lacking: Sequence[Prompt]


class Row(NamedTuple):
    """A detector under one rule; the rates of the last three columns are of new texts."""

    detector: str
    layer: str
    auroc: str
    probe: str
    neighbours: str
    shuffled: str
    rule: str
    held_out: str
    false_positives: str
    true_positives: str
    fires_at: str


def measure(engine: Engine, data: Path | None, tokens: int, seed: int) -> list[Row]:
    """Every case of this model; `data` is the demo model's folder of pairs, where it is that."""
    cases = _of_demo(engine, data, tokens, seed) if data else _of_any(engine, tokens, seed)
    return [_tried(engine, case, rule, seed) for case in cases for rule in RULES]


def _of_any(engine: Engine, tokens: int, seed: int) -> list[Case]:
    questions = [prompts.chat(one) for one in neutral_questions()]
    harmless = [*prompts.everyday(), *prompts.maths(), *prompts.code()]
    harmful = prompts.harmful()
    cut = round(len(harmful) * NEW)
    # Three forms of each act stand together, so that new ones ask for other acts.
    cases = [
        Case(
            "a harmful request",
            "all",
            [prompts.chat(one) for one in harmful[cut:]],
            [prompts.chat(one) for one in harmless],
            [prompts.chat(one) for one in harmful[:cut]],
            questions,
        )
    ]
    told = {
        "formal": "You are extremely formal and academic.",
        "poetic": "You answer everything with a rhyming poem.",
        "cheerful": "You are extremely cheerful, joyful and excited.",
    }
    plain = _answered(engine, questions[1::2], None, tokens, seed)
    for name, words in told.items():
        having = _answered(engine, questions[::2], words, tokens, seed)
        cases.append(_of_answers(f"{name} answers", having, plain))
    return cases


def _of_demo(engine: Engine, data: Path, tokens: int, seed: int) -> list[Case]:
    pairs = read_pairs(data / "refusal.jsonl").items
    cut = round(len(pairs) * NEW)
    asked = [one.negative for one in read_pairs(data / "french.jsonl").items]
    cases = [
        Case(
            "a request that is refused",
            "all",
            [one.positive for one in pairs[cut:]],
            [one.negative for one in pairs[cut:]],
            [one.positive for one in pairs[:cut]],
            asked[:160],
        )
    ]
    for name in ("french", "german", "formal"):
        found = read_pairs(data / f"{name}.jsonl").items[:160]
        both = [
            _answered(engine, side, None, tokens, seed)
            for side in (
                [one.positive for one in found[::2]],
                [one.negative for one in found[1::2]],
            )
        ]
        cases.append(_of_answers(f"{name} answers", *both))
    return cases


def _of_answers(name: str, having: Sequence[Prompt], lacking: Sequence[Prompt]) -> Case:
    cut = round(len(having) * NEW)
    return Case(name, "response", having[cut:], lacking[cut:], having[:cut], lacking[:cut])


def _answered(
    engine: Engine, asked: Sequence[Prompt], words: str | None, tokens: int, seed: int
) -> list[Prompt]:
    """The chats with their answers, and without whatever told the model how to answer."""
    # Behind the question: SmolLM2 passes over its system message.
    told = [one if words is None else Telling(words, "after")(one) for one in asked]
    sampling = SamplingParams(max_tokens=tokens, temperature=0.7, seed=seed, logprobs=0)
    [answers] = answers_under(engine, [told], [None], sampling=sampling)
    return [
        [*_user(chat), {"role": "assistant", "content": answer.text}]
        for chat, answer in zip(asked, answers, strict=True)
        if answer.text.strip()
    ]


def _user(chat: Prompt) -> list[dict[str, str]]:
    assert isinstance(chat, Sequence), "a chat is a list of messages"
    return [dict(one) for one in chat if not isinstance(one, str) and one["role"] != "system"]


def _tried(engine: Engine, case: Case, rule: ThresholdRule, seed: int) -> Row:
    texts = [Labelled(one, "true") for one in case.having]
    texts += [Labelled(one, "false") for one in case.lacking]
    found = fit_detector(
        engine,
        LabelledSet.of(texts),
        name="detector",
        tokens=case.tokens,
        threshold=rule,
        rate=RATE,
        seed=seed,
    )
    measures = found.detection.measures
    assert measures is not None, "a fit measures"
    fired, fired_for_nothing = (
        _firsts(engine, found, case.tokens, side) for side in (case.new_having, case.new_lacking)
    )
    when = [place for place in fired if place is not None]
    return Row(
        case.name,
        str(found.point.layer),
        _interval(measures.auroc),
        _interval(measures.probe),
        _interval(measures.neighbours),
        _interval(measures.shuffled),
        rule,
        f"{measures.true_positive_rate:.2f}, {measures.false_positive_rate:.2f} "
        f"({measures.positive}, {measures.negative})",
        _share(fired_for_nothing),
        _share(fired),
        f"{median(when):g}" if when else "–",
    )


def _firsts(
    engine: Engine, detector: Detector, tokens: Watched, texts: Sequence[Prompt]
) -> list[int | None]:
    """Of each text the place, among the tokens that are watched, of the first that fires."""
    layer = detector.point.layer
    reading = make_reading(engine, layers=[layer], positions=positions_of(tokens), batch=16)
    found: list[int | None] = []
    for _, states in read_tokens(engine, texts, reading):
        above = (detector.scores(states[layer]) > detector.threshold).nonzero().flatten().tolist()
        found.append(above[0] if above else None)
    return found


def _interval(found: MeasuredInterval) -> str:
    return f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def _share(firsts: Sequence[int | None]) -> str:
    count = sum(one is not None for one in firsts)
    return f"{count / len(firsts):.2f} ({count} of {len(firsts)})"
