"""Texts and chats as tokens: one rule, whoever asks."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

import steer
import steer_server
from steer.engines.fake.engine import ByteTokenizer, FakeEngine
from steer.errors import SteerError
from steer.prompts import (
    Marked,
    PromptInput,
    answer_text,
    chat_tokens,
    encode_prompt,
    has_chat_template,
    part_tokens,
    render,
    text_tokens,
)

TOKENIZER = ByteTokenizer()
BOS = TOKENIZER.bos_token_id
CHAT = [{"role": "developer", "content": "be kind"}, {"role": "user", "content": "né?"}]


def test_a_whole_text_gets_the_tokenizers_special_tokens_and_a_part_gets_none() -> None:
    assert text_tokens(TOKENIZER, "ab") == [BOS, *b"ab"]
    assert part_tokens(TOKENIZER, "ab") == [*b"ab"]
    assert render(TOKENIZER, "ab") == text_tokens(TOKENIZER, "ab")
    assert render(TOKENIZER, Marked("ab", response="cd")) == [BOS, *b"abcd"]


def test_a_chat_is_the_same_tokens_for_a_client_a_fit_and_an_inspection() -> None:
    asked = PromptInput.model_validate({"messages": CHAT})
    read = encode_prompt(FakeEngine(), asked)
    assert read.text == "<|bos|><|system|>be kind<|user|>né?<|assistant|>"
    assert list(read.ids) == render(TOKENIZER, CHAT)
    assert list(read.ids) == chat_tokens(TOKENIZER, CHAT)
    # The template writes the only special tokens there are.
    assert read.ids.count(BOS) == 1


def test_a_chat_that_ends_with_an_answer_is_not_opened_for_another() -> None:
    answered = [*CHAT, {"role": "assistant", "content": "yes"}]
    assert TOKENIZER.decode(render(TOKENIZER, answered)).endswith("<|assistant|>yes")


class _NoTemplate(ByteTokenizer):
    chat_template = None  # type: ignore[assignment]


class _BadTemplate(ByteTokenizer):
    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        raise TypeError("can only concatenate str")


def test_data_needs_a_chat_template() -> None:
    assert has_chat_template(TOKENIZER)
    assert not has_chat_template(_NoTemplate())
    with pytest.raises(SteerError) as caught:
        render(_NoTemplate(), CHAT)
    assert caught.value.code == "no_chat_template"


def test_whatever_a_template_raises_is_about_the_messages() -> None:
    with pytest.raises(SteerError, match="only concatenate") as caught:
        chat_tokens(_BadTemplate(), CHAT, param="/messages")
    assert (caught.value.code, caught.value.param) == ("invalid_messages", "/messages")


def test_answers_are_without_special_tokens() -> None:
    assert answer_text(TOKENIZER, (*b"yes", TOKENIZER.eos_token_id)) == "yes"


def test_nobody_else_tokenises() -> None:
    """The rules hold everywhere because they are applied in one place."""
    rules = re.compile(r"apply_chat_template\(|add_special_tokens=|skip_special_tokens=True")
    roots = [Path(module.__file__ or "").parent for module in (steer, steer_server)]
    found = {
        path.relative_to(root).as_posix()
        for root in roots
        for path in root.rglob("*.py")
        if rules.search(path.read_text(encoding="utf-8"))
    }
    tokenizers = {"engines/fake/tokenizer.py", "jobs/tokenizing.py"}
    # Counts the tokens of a text's beginning, and makes no prompt of them.
    tokenizers.add("prompts/length.py")
    assert found - tokenizers == {"prompts/chat.py", "prompts/tokens.py", "prompts/spans.py"}
