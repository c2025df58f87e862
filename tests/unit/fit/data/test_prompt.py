"""Prompts as tokens, and which of them are read."""

from __future__ import annotations

from typing import Any

import pytest

from steer.engines.fake.engine import ByteTokenizer, FakeEngine
from steer.errors import FileFormatError, SteerError
from steer.fit.data.prompt import (
    Marked,
    Prompt,
    parse_prompt,
    prompt_json,
    read_positions,
    render,
    subject_position,
)
from steer.prompts import PromptInput, encode_prompt

TOKENIZER = ByteTokenizer()
ASK = [{"role": "user", "content": "Is Oslo cold? Oslo?"}]
ANSWERED = [*ASK, {"role": "assistant", "content": "yes"}]


def read(prompt: Prompt, at: Any) -> str:
    """The text of the tokens that are read."""
    tokens = render(TOKENIZER, prompt)
    places = read_positions(TOKENIZER, prompt, tokens, at)
    return TOKENIZER.decode(tokens[places.start : places.stop])


@pytest.mark.parametrize(
    ("prompt", "at", "text"),
    [
        ("abc", "last", "c"),
        ("abc", "mean", "<|bos|>abc"),
        ("abc", 1, "a"),
        ("abc", -2, "b"),
        (Marked("ab", response="cd"), "response", "cd"),
        (Marked("ab", response="cd"), "last", "d"),
        (Marked(ASK, response="no"), "response", "no"),
        (ANSWERED, "response", "yes"),
        (Marked("Oslo is old", subject="Oslo"), "subject", "o"),
        (Marked("né à Orléans.", subject="Orléans"), "subject", "s"),
    ],
)
def test_what_is_read(prompt: Prompt, at: Any, text: str) -> None:
    assert read(prompt, at) == text


def test_a_subject_is_its_last_occurrence_before_the_response() -> None:
    prompt = Marked(ASK, response=" Oslo is", subject="Oslo")
    tokens = render(TOKENIZER, prompt)
    place = subject_position(TOKENIZER, prompt)
    assert TOKENIZER.decode(tokens[: place + 1]) == "<|bos|><|user|>Is Oslo cold? Oslo"


@pytest.mark.parametrize("subject", ["café", "日本", "🙂"])
def test_a_subject_ends_with_the_last_part_of_its_last_character(subject: str) -> None:
    """As an inspection finds the same text."""
    text = f"{subject} or {subject}, then"
    place = subject_position(TOKENIZER, Marked(text, subject=subject))
    tokens = render(TOKENIZER, text)
    assert TOKENIZER.decode(tokens[: place + 1]) == f"<|bos|>{subject} or {subject}"
    read = encode_prompt(FakeEngine(), PromptInput(text=text))
    assert read.position(subject, param="/p") == place


@pytest.mark.parametrize(
    ("prompt", "at", "code"),
    [
        ("abc", "response", "no_response"),
        (ASK, "response", "no_response"),
        ("abc", "subject", "no_subject"),
        (Marked("abc", subject="d"), "subject", "no_subject"),
        (Marked("abc", response="d", subject="d"), "subject", "no_subject"),
        ("abc", 4, "position_out_of_range"),
        ("abc", -5, "position_out_of_range"),
    ],
)
def test_what_cannot_be_read_is_refused(prompt: Prompt, at: Any, code: str) -> None:
    with pytest.raises(SteerError) as caught:
        read_positions(TOKENIZER, prompt, render(TOKENIZER, prompt), at)
    assert caught.value.code == code


@pytest.mark.parametrize(
    "value",
    ["a", ASK, {"prompt": "a", "response": "b"}, {"prompt": ASK, "response": "b", "subject": "c"}],
)
def test_prompts_survive_json(value: Any) -> None:
    assert prompt_json(parse_prompt(value, "here", "a prompt")) == value


@pytest.mark.parametrize(
    "value",
    [
        {},
        {"prompt": "a", "label": "b"},
        {"response": "b"},
        {"prompt": "a", "response": ""},
        {"prompt": {"prompt": "a"}},
        {"prompt": "a", "subject": 3},
        [],
        7,
    ],
)
def test_what_is_no_prompt_is_refused(value: Any) -> None:
    with pytest.raises(FileFormatError, match="here"):
        parse_prompt(value, "here", "a prompt")
