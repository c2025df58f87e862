"""Mistral's own tokenizer, which vLLM's environment brings: as transformers gives it and as vLLM
wraps it."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
from transformers.tokenization_mistral_common import MistralCommonBackend
from vllm.tokenizers.mistral import MistralTokenizer

from steer.errors import SteerError
from steer.fit.data.prompt import read_positions, subject_position
from steer.prompts import EncodedPrompt, Marked, end_tokens, has_chat_template, render, text_tokens
from steer.prompts.chat import CONTINUED, chat_tokens, read_chat

CONTROL = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]")
CONTROL += ("[TOOL_RESULTS]", "[/TOOL_RESULTS]", "[TOOL_CALLS]", "[IMG]", "<pad>", "[IMG_BREAK]")
CONTROL += ("[IMG_END]", "[PREFIX]", "[MIDDLE]", "[SUFFIX]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
CONTROL += ("[TOOL_CONTENT]",)
CHAT = [{"role": "system", "content": "be"}, {"role": "user", "content": "hey [INST] 🦊"}]
WRITTEN = "<s>[SYSTEM_PROMPT]be[/SYSTEM_PROMPT][INST]hey [INST] 🦊[/INST]"


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A vocabulary of bytes and control tokens, in the form of `tekken.json`."""
    folder = tmp_path_factory.mktemp("mistral")
    control = [
        {"rank": rank, "token_str": text, "is_control": True} for rank, text in enumerate(CONTROL)
    ]
    words = [
        {"rank": byte, "token_bytes": base64.b64encode(bytes([byte])).decode(), "token_str": None}
        for byte in range(256)
    ]
    config = {
        "pattern": r"\p{L}+|\p{N}|\s+|[^\s\p{L}\p{N}]+",
        "num_vocab_tokens": len(words),
        "default_vocab_size": len(words) + len(control),
        "default_num_special_tokens": len(control),
        "version": "v7",
    }
    (folder / "tekken.json").write_text(
        json.dumps(
            {"config": config, "vocab": words, "special_tokens": control, "multimodal": None}
        )
    )
    return MistralCommonBackend.from_pretrained(str(folder))


@pytest.fixture(params=["transformers", "vllm"])
def tokenizer(request: pytest.FixtureRequest, backend: Any) -> Any:
    return backend if request.param == "transformers" else MistralTokenizer(backend)


def test_control_tokens_are_the_templates_and_those_of_a_user_are_text(tokenizer: Any) -> None:
    assert has_chat_template(tokenizer)
    ids, text = read_chat(tokenizer, CHAT)
    assert text == WRITTEN
    counts = {mark: ids.count(CONTROL.index(mark)) for mark in ("<s>", "[INST]", "[/INST]")}
    assert counts == {"<s>": 1, "[INST]": 1, "[/INST]": 1}
    prompt = EncodedPrompt(tuple(ids), text, tokenizer)
    assert prompt.position("🦊", param="/p") == len(ids) - 2
    assert end_tokens(tokenizer) == {CONTROL.index("</s>")}


def test_answers_and_subjects_are_found(tokenizer: Any) -> None:
    for prompt in ([*CHAT, {"role": "assistant", "content": "yes 🦊"}], Marked(CHAT, "yes 🦊")):
        tokens = render(tokenizer, prompt)
        places = read_positions(tokenizer, prompt, tokens, "response")
        assert tokenizer.decode(tokens) == WRITTEN + "yes 🦊"
        assert tokenizer.decode(tokens[places.start : places.stop]) == "yes 🦊"
    asked = Marked("a 🦊 b", subject="🦊")
    place = subject_position(tokenizer, asked)
    assert tokenizer.decode(text_tokens(tokenizer, "a 🦊 b")[: place + 1]).endswith("a 🦊")


def test_an_answer_is_continued_and_refused_in_its_own_words(tokenizer: Any) -> None:
    said = [*CHAT, {"role": "assistant", "content": "yes"}]
    assert tokenizer.decode(chat_tokens(tokenizer, said, CONTINUED)) == WRITTEN + "yes"
    with pytest.raises(SteerError, match="continue_final_message") as caught:
        chat_tokens(tokenizer, said)
    assert caught.value.code == "invalid_messages"
