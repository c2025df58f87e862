"""An oracle is trained on questions about states, and measured on prompts that it has not seen."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import OracleForm
from steer.cli.local import running_engine
from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.engines.journal import JournaledEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import FileFormatError, SteerError
from steer.fit import Marked, QuestionSet, StateQuestion, fit_oracle, read_questions
from steer.fit.methods import bookmark
from steer.fit.methods.trained.asked_oracle import _states, check_questions
from steer.fit.states import prompt_tokens
from steer.inspection import AskRequest, ask
from steer.model import HookPoint

DATA = Path(__file__).parents[5] / "vectors" / "demo" / "data"
ASKED = "Which language comes next?"
FORM = OracleForm(message="{states}: {question}?", placeholder="#")
"""A byte is a token here, and the papers' placeholder is two."""
ANIMALS = ("fox", "owl", "cod", "eel", "ant", "bee", "hen", "pig", "rat", "yak")
MOODS = {"glad": "y", "grim": "n"}
QUESTIONS = QuestionSet.of(
    [
        StateQuestion(Marked(f"{mood} is the {one} of it", subject=mood), "Fine", said)
        for one in ANIMALS
        for mood, said in MOODS.items()
    ]
)
OPTIONS: dict[str, Any] = {
    "name": "sibyl",
    "oracle_form": FORM,
    "layers": [1],
    "rank": 4,
    "steps": 60,
    "batch": 8,
    "rate": 0.02,
    "held_out": 0.3,
}


LANGUAGES = {"french": "French", "german": "German"}


def language_questions(count: int) -> QuestionSet:
    """Which language the demo model answers in, as its own system message has it."""
    items = []
    for name, said in LANGUAGES.items():
        lines = (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()[:count]
        sides = {"positive": said} if items else {"positive": said, "negative": "English"}
        for row in map(json.loads, lines):
            items += [StateQuestion(row[side], ASKED, answer) for side, answer in sides.items()]
    return QuestionSet.of(items)


@pytest.fixture(scope="module")
def demo() -> Iterator[TransformersEngine]:
    with running_engine("steer-demo") as engine:
        yield engine


@pytest.fixture(scope="module")
def oracle(demo: TransformersEngine) -> Oracle:
    options: dict[str, Any] = {"steps": 40, "rate": 3e-3, "rank": 8, "batch": 16}
    return fit_oracle(demo, language_questions(30), name="sibyl", layers=[2, 3], **options)


def test_it_reads_states_and_is_measured_beside_what_reads_none(oracle: Oracle) -> None:
    made: dict[str, Any] = oracle.card.provenance
    right = made["right"]
    assert right["oracle"] > 0.9
    assert right["untrained"] == 0.0
    assert max(right["shuffled"], right["text"], right["commonest"]) < 0.6
    assert made["loss_after"] < made["loss_before"] / 10
    assert (made["held_out_questions"], made["held_out"]) == (36, True)
    assert oracle.card.used_layers == (2, 3)
    assert {part.down.dtype for part in oracle.lora.parts.values()} == {torch.bfloat16}


def test_it_answers_when_it_is_asked(demo: TransformersEngine, oracle: Oracle) -> None:
    library = MemoryLibrary({}, oracles={"sibyl": oracle})
    for told, said in ((["Answer in French."], "French"), ([], "English")):
        messages = [{"role": "system", "content": one} for one in told]
        messages.append({"role": "user", "content": "What is the capital of Japan?"})
        body = {"source": {"messages": messages}, "questions": [ASKED], "oracle": "sibyl"}
        found = ask(demo, AskRequest.model_validate(body), library=library)
        assert [(cell.layer, cell.text) for cell in found.cells] == [(2, said), (3, said)]


def test_a_state_is_that_of_the_subject_where_one_is_named(lively: TransformersEngine) -> None:
    text = "grim is the fox of it"
    ids = tuple(prompt_tokens(lively, text))
    subject = len(prompt_tokens(lively, "grim")) - 1
    points = (HookPoint(1),)
    (captured,) = lively.capture(CaptureRequest([ids], points))
    prompts = {"a": Marked(text, subject="grim"), "b": text}
    read = dict(_states(lively, prompts, points, None))
    assert (read["a"].text, read["b"].text) == ("grim", text)
    for key, place in (("a", subject), ("b", -1)):
        assert torch.equal(read[key].states[1], captured.states[points[0]][place])


def test_all_that_is_asked_of_a_prompt_is_on_one_side(lively: TransformersEngine) -> None:
    twice = [
        StateQuestion(one.prompt, words, one.answer)
        for one in QUESTIONS.items
        for words in ("Fine", "Well")
    ]
    options = {**OPTIONS, "steps": 1}
    made: dict[str, Any] = fit_oracle(lively, QuestionSet.of(twice), **options).card.provenance
    assert (made["questions"], made["prompts"], made["held_out_questions"]) == (28, 14, 12)
    few = QuestionSet.of(twice[:4])
    assert not fit_oracle(lively, few, **options).card.provenance["held_out"]


def test_it_goes_on_where_it_was_ended(
    lively: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bookmark, "_SHARE", 0)
    options = {**OPTIONS, "steps": 8}
    whole = fit_oracle(lively, QUESTIONS, **options)

    class Ended(Exception):
        pass

    for most in (3, 5, None):
        steps = 0

        def progress(units: int) -> None:
            nonlocal steps
            steps += units
            if most is not None and steps >= len(QUESTIONS) + most:  # noqa: B023
                raise Ended

        engine = JournaledEngine(lively, tmp_path / "journal")
        if most is None:
            found = fit_oracle(engine, QUESTIONS, **options, progress=progress)
        else:
            with pytest.raises(Ended):
                fit_oracle(engine, QUESTIONS, **options, progress=progress)
    assert found.sha256 == whole.sha256
    assert steps == len(QUESTIONS) + 8


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ('{"prompt": "a", "question": "b"}', "exactly the keys 'prompt', 'question' and 'answer'"),
        ('{"prompt": "a", "question": "b", "answer": ""}', "'answer' must be a text; got ''"),
        ('{"prompt": "a", "question": 3, "answer": "c"}', "'question' must be a text; got 3"),
        ('{"prompt": 3, "question": "b", "answer": "c"}', "'prompt'"),
        (f'{{"prompt": "a", "question": "{"b" * 2049}", "answer": "c"}}', "has 2049 characters"),
    ],
)
def test_a_file_says_which_line_is_wrong(tmp_path: Path, line: str, said: str) -> None:
    path = tmp_path / "asked.jsonl"
    path.write_text('{"prompt": "a", "question": "b", "answer": "c"}\n' + line + "\n")
    with pytest.raises(FileFormatError, match="line 2") as raised:
        read_questions(path)
    assert said in str(raised.value)
    assert raised.value.code == "invalid_questions"


def test_what_cannot_be_learnt(lively: TransformersEngine) -> None:
    with pytest.raises(SteerError) as raised:
        fit_oracle(FakeEngine(fake_model()), QUESTIONS, name="x")
    assert raised.value.code == "no_gradients"
    for options, code in (({"rank": 33}, "invalid_option"), ({"steps": 0}, "invalid_option")):
        with pytest.raises(SteerError) as raised:
            fit_oracle(lively, QUESTIONS, **{**OPTIONS, **options})
        assert raised.value.code == code
    held = QuestionSet.of([StateQuestion("a", "#", "b")])
    with pytest.raises(SteerError) as raised:
        check_questions(lively, held, FORM)
    assert (raised.value.code, raised.value.param) == (
        "ambiguous_placeholder",
        "/questions/0/question",
    )
