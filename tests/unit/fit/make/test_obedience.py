"""Answers read with and without an instruction."""

from __future__ import annotations

import math

import pytest
import torch

from steer.engines.base import CaptureRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.make.asking import Asked, Interview
from steer.fit.make.obedience import (
    AnswerReading,
    InstructionScorer,
    SoundScorer,
    obedience,
    readings,
    said_kl,
)
from steer.fit.make.soundness import Soundness
from steer.fit.measure.answers import Answer
from steer.fit.measure.scoring import Score
from steer.readouts.measures import kl_divergence

QUESTIONS = ["how", "why", "when it rains", "who?"]
SAMPLING = SamplingParams(max_tokens=6, temperature=0.7, seed=0, logprobs=0)


@pytest.fixture(scope="module")
def talk(lively: TransformersEngine) -> Interview:
    return Interview(lively, "be loud", "be quiet", SAMPLING, place="after")


def mean_logprob(engine: TransformersEngine, prompt: tuple[int, ...], said: list[int]) -> float:
    [one] = engine.capture(CaptureRequest([[*prompt, *said]], logits="all"))
    assert one.logits is not None
    table = one.logits.double().log_softmax(-1)
    rows = range(len(prompt) - 1, len(prompt) + len(said) - 1)
    return sum(float(table[n, t]) for n, t in zip(rows, said, strict=True)) / len(said)


def test_readings_are_the_mean_log_probabilities_after_both_prompts(talk: Interview) -> None:
    asked = talk.asked(QUESTIONS)
    # Several answers to one question, of one length, are read together; others alone.
    rows = [asked[0]] * 5 + asked
    said = [[65 + n, 66, 67] for n in range(5)] + [[70], [71, 72], [], [73, 74, 75, 76]]

    found = readings(talk.engine, rows, said)

    assert found[7] is None
    for one, tokens, read in zip(rows, said, found, strict=True):
        if read is not None:
            told = mean_logprob(talk.engine, one.told, tokens)  # type: ignore[arg-type]
            opposed = mean_logprob(talk.engine, one.opposed, tokens)  # type: ignore[arg-type]
            assert read.told == pytest.approx(told, abs=1e-4)
            assert read.opposed == pytest.approx(opposed, abs=1e-4)
            assert read.gain == pytest.approx(told - opposed, abs=2e-4)


def test_answers_of_the_told_model_are_told_apart(talk: Interview) -> None:
    asked = talk.asked(QUESTIONS)
    plain, told, opposed = talk.answers(
        QUESTIONS, [talk.told(q) for q in QUESTIONS], [talk.opposed(q) for q in QUESTIONS]
    )

    found = obedience(talk.engine, asked, plain, told, opposed, known=asked)
    chance = obedience(talk.engine, asked, plain, told, told, known=asked)

    assert found.area > 0.8
    assert chance.area == pytest.approx(0.5)
    gains = [r.gain for r in readings(talk.engine, asked, [a.tokens for a in plain]) if r]
    assert found.scorer.mean == pytest.approx(sum(gains) / len(gains))


def test_the_scorer_puts_a_half_at_two_deviations() -> None:
    scorer = InstructionScorer({}, mean=0.1, deviation=0.05, soundness=Soundness(3.0))

    def score(gain: float, loss: float = 1.0) -> Score:
        return scorer._score(AnswerReading(-loss, -loss - gain), [1, 2, 3])

    assert score(0.2).value == pytest.approx(0.5)
    assert score(0.1).value == pytest.approx(1 / (1 + math.exp(3)))
    assert score(0.2).valid
    assert score(0.2, 3.5).valid is False
    assert score(1e6).value == pytest.approx(1.0)


def test_an_answer_without_tokens_is_unsound(talk: Interview) -> None:
    asked = talk.asked(QUESTIONS[:1])
    scorer = InstructionScorer({asked[0].plain: asked[0]}, 0.0, 1.0, Soundness(99.0))

    [found] = scorer.score(talk.engine, [asked[0].plain], [[]], [""])

    assert (found.value, found.valid) == (0.0, False)


def test_another_scorer_is_held_to_soundness(talk: Interview) -> None:
    [one] = talk.asked(QUESTIONS[:1])
    reader = InstructionScorer({one.plain: one}, 0.0, 1.0, Soundness(99.0))
    scorer = SoundScorer(lambda text: Score(float("a" in text)), reader)

    found = scorer.score(
        talk.engine, [one.plain] * 2, [[65, 66, 67], [65] * 9], ["a fine text", "a a a a a"]
    )

    assert [score.value for score in found] == [1.0, 1.0]
    assert [score.valid for score in found] == [True, False]


def test_how_far_words_move_the_model(talk: Interview) -> None:
    [asked] = talk.asked(QUESTIONS[:1])
    answer = Answer(asked.plain, (65, 66), "AB", (), Score(0.0))

    rows = []
    for prompt in (asked.told, asked.plain):
        [one] = talk.engine.capture(CaptureRequest([prompt + answer.tokens], logits="all"))
        assert one.logits is not None
        rows.append(one.logits[len(prompt) - 1 :])

    expected = float(kl_divergence(*rows).mean())
    assert said_kl(talk.engine, [asked], [answer]) == pytest.approx(expected, rel=1e-4)
    assert expected > 0
    same = Asked(asked.plain, asked.plain, asked.plain)
    assert said_kl(talk.engine, [same], [answer]) == pytest.approx(0.0, abs=1e-9)


def test_answers_that_say_nothing_are_refused(talk: Interview) -> None:
    asked = talk.asked(QUESTIONS[:2])
    silent = [Answer(one.plain, (), "") for one in asked]

    with pytest.raises(SteerError) as caught:
        obedience(talk.engine, asked, silent, silent, silent, known=asked)
    assert caught.value.code == "no_answers"
    assert torch.is_grad_enabled()
