"""The answer's own tokens, in whatever a template makes of a chat."""

from __future__ import annotations

from typing import Any

import pytest
from chats import TEMPLATES, WithoutTemplate, chat_tokenizer

from steer.errors import SteerError
from steer.fit.data.prompt import read_positions, subject_position
from steer.prompts import Marked, Prompt, render

ASK = [{"role": "user", "content": "fox or yes?"}]
THOUGHT = "<think>\nfox, yes\n</think>\n\n"


def answered(content: str) -> list[dict[str, str]]:
    return [*ASK, {"role": "assistant", "content": content}]


def read(tokenizer: Any, prompt: Prompt) -> tuple[str, str, str]:
    """The text before the response, the response, and the text behind it."""
    tokens = render(tokenizer, prompt)
    places = read_positions(tokenizer, prompt, tokens, "response")
    parts = tokens[: places.start], tokens[places.start : places.stop], tokens[places.stop :]
    return tuple(tokenizer.decode(part) for part in parts)  # type: ignore[return-value]


@pytest.mark.parametrize(
    "content", ["yes", "fox or yes?", "🦊 é", "<|im_end|>", "</s>", "assistant\n"]
)
@pytest.mark.parametrize("template", TEMPLATES)
def test_the_response_is_what_the_assistant_said(template: str, content: str) -> None:
    """Neither the marks around it, nor the same words elsewhere."""
    tokenizer = chat_tokenizer(template)
    _, found, _ = read(tokenizer, answered(content))
    assert found.strip() == content.strip()
    _, found, behind = read(tokenizer, Marked(ASK, response=content))
    assert (found.strip(), behind) == (content.strip(), "")


@pytest.mark.parametrize(
    ("template", "before", "behind"),
    [
        ("chatml", "assistant\n", "<|im_end|>\n"),
        ("empties", "assistant\n<think>\n\n</think>\n\n", "<|im_end|>\n"),
        ("opens", "<Assistant>", "</s>"),
        ("channels", "final<|message|>", "<|return|>"),
        ("folding", "[/INST]", " </s>"),
    ],
)
def test_marks_are_no_part_of_the_response(template: str, before: str, behind: str) -> None:
    start, found, rest = read(chat_tokenizer(template), answered("yes"))
    assert start.rstrip(" ").endswith(before)
    assert (found.strip(), rest) == ("yes", behind)


@pytest.mark.parametrize(
    ("template", "before"),
    [
        # Kept, stripped, and unknown: then it is words like others.
        ("empties", "<|im_start|>assistant\n" + THOUGHT),
        ("opens", "<User>fox or yes?<Assistant>"),
    ],
)
def test_thoughts_in_a_content_are_no_part_of_the_response(template: str, before: str) -> None:
    start, found, _ = read(chat_tokenizer(template), answered(THOUGHT + "yes"))
    assert start.endswith(before)
    assert found == "yes"


def test_a_template_that_knows_no_thoughts_has_words_alone() -> None:
    assert read(chat_tokenizer("chatml"), answered(THOUGHT + "yes"))[1] == THOUGHT + "yes"


@pytest.mark.parametrize(
    ("template", "response", "before", "found"),
    [
        # A response goes on from the opening of an answer …
        ("chatml", " yes", "<|im_start|>assistant\n", " yes"),
        # … unless answers stand elsewhere: not in the thought that is open, behind an empty one.
        ("opens", "yes", "<Assistant>", "yes"),
        ("empties", "yes", "assistant\n<think>\n\n</think>\n\n", "yes"),
        ("channels", "yes", "<|channel|>final<|message|>", "yes"),
        # A response with its own thought is said as it is given.
        ("opens", "fox\n</think>\n\nyes", "<Assistant><think>\nfox\n</think>\n\n", "yes"),
        ("empties", THOUGHT + "yes", "assistant\n" + THOUGHT, "yes"),
    ],
)
def test_a_response_stands_where_the_model_would_have_said_it(
    template: str, response: str, before: str, found: str
) -> None:
    start, text, behind = read(chat_tokenizer(template), Marked(ASK, response=response))
    assert start.endswith(before)
    assert (text, behind) == (found, "")


def test_a_tokenizer_with_a_program_of_its_own_has_responses_too() -> None:
    tokenizer = WithoutTemplate()
    for prompt in (answered("yes"), Marked(ASK, response="yes")):
        assert read(tokenizer, prompt) == ("<s>[INST]fox or yes?[/INST]", "yes", "")


@pytest.mark.parametrize("content", ["", " \n", THOUGHT])
def test_an_answer_without_words_is_none(content: str) -> None:
    tokenizer = chat_tokenizer("opens")
    prompt = answered(content)
    with pytest.raises(SteerError) as caught:
        read_positions(tokenizer, prompt, render(tokenizer, prompt), "response")
    assert caught.value.code == "no_response"


@pytest.mark.parametrize("template", TEMPLATES)
def test_a_subject_is_found_in_a_chat(template: str) -> None:
    tokenizer = chat_tokenizer(template)
    prompt = Marked([{"role": "user", "content": "a 🦊 or"}], response="🦊", subject="🦊")
    place = subject_position(tokenizer, prompt)
    assert tokenizer.decode(render(tokenizer, prompt)[: place + 1]).endswith("a 🦊")
