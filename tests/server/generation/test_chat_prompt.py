"""The fields of a chat request that shape its prompt, as vLLM's server names them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from chats import WithoutTemplate, chat_tokenizer

from steer.engines.fake.engine import ByteTokenizer, FakeEngine
from steer.errors import SteerError
from steer_server.generation.chat_prompt import chat_prompt
from steer_server.generation.request_models import ChatRequest

URL = "/v1/chat/completions"
Body = Callable[..., dict[str, Any]]
ASK = {"role": "user", "content": "who?"}
ANSWER = {"role": "assistant", "content": "fox"}


def prompt(tokenizer: Any, *messages: dict[str, Any], **fields: Any) -> str:
    body = ChatRequest.model_validate({"model": "m", "messages": list(messages) or [ASK], **fields})
    engine = SimpleNamespace(tokenizer=tokenizer, info=SimpleNamespace(max_length=4096))
    serving: Any = SimpleNamespace(engine=engine)
    return str(tokenizer.decode(chat_prompt(serving, body)))


@pytest.mark.parametrize(
    ("template", "fields", "ending"),
    [
        ("empties", {}, "assistant\n"),
        ("empties", {"chat_template_kwargs": None, "reasoning_effort": None}, "assistant\n"),
        (
            "empties",
            {"chat_template_kwargs": {"enable_thinking": False}},
            "assistant\n<think>\n\n</think>\n\n",
        ),
        # As on vLLM's server, an effort switches thinking unless that is given.
        ("empties", {"reasoning_effort": "none"}, "assistant\n<think>\n\n</think>\n\n"),
        ("empties", {"reasoning_effort": "high"}, "assistant\n"),
        (
            "empties",
            {"reasoning_effort": "high", "chat_template_kwargs": {"enable_thinking": False}},
            "assistant\n<think>\n\n</think>\n\n",
        ),
        ("empties", {"add_generation_prompt": False}, "who?<|im_end|>\n"),
        ("empties", {"add_generation_prompt": True}, "assistant\n"),
    ],
)
def test_what_follows_the_messages(template: str, fields: dict[str, Any], ending: str) -> None:
    assert prompt(chat_tokenizer(template), **fields).endswith(ending)


@pytest.mark.parametrize("effort", ["none", "low", "high"])
def test_an_effort_is_told_to_a_template_that_reads_it(effort: str) -> None:
    for fields in (
        {"reasoning_effort": effort},
        {"chat_template_kwargs": {"reasoning_effort": effort}},
    ):
        assert f"Reasoning: {effort}<" in prompt(chat_tokenizer("channels"), **fields)
    assert f"effort {effort}" in prompt(WithoutTemplate(), reasoning_effort=effort)


@pytest.mark.parametrize(
    ("template", "ending"),
    [("chatml", "assistant\nfox"), ("empties", "</think>\n\nfox"), ("llama3", "\n\nfox")],
)
@pytest.mark.parametrize("fields", [{}, {"add_generation_prompt": False}])
def test_the_last_message_is_gone_on_with(
    template: str, ending: str, fields: dict[str, Any]
) -> None:
    found = prompt(chat_tokenizer(template), ASK, ANSWER, continue_final_message=True, **fields)
    assert found.endswith(ending)
    # Without the field the answer is closed, and another one opened.
    assert not prompt(chat_tokenizer(template), ASK, ANSWER).endswith(ending)


def test_mistrals_own_tokenizer_goes_on_with_the_last_message() -> None:
    found = prompt(WithoutTemplate(), ASK, ANSWER, continue_final_message=True)
    assert found == "<s>[INST]who?[/INST]fox"


@pytest.mark.parametrize(("template", "begins"), [("chatml", 1), ("llama3", 1), ("gemma", 1)])
def test_special_tokens_are_added_once(template: str, begins: int) -> None:
    """Whether or not the template has written them."""
    found = prompt(chat_tokenizer(template), add_special_tokens=True)
    assert found.count("<s>") == begins
    assert found.removeprefix("<s>") == prompt(chat_tokenizer(template)).removeprefix("<s>")


@pytest.mark.parametrize(
    ("tokenizer", "fields", "code", "param"),
    [
        (
            chat_tokenizer("chatml"),
            {"reasoning_effort": "none"},
            "unsupported_parameter",
            "/reasoning_effort",
        ),
        (
            chat_tokenizer("{{ messages[0].content }}{{ thinking }}"),
            {"reasoning_effort": "low"},
            "unsupported_parameter",
            "/reasoning_effort",
        ),
        (
            chat_tokenizer("empties"),
            {"chat_template_kwargs": {"enable_thinkin": False}},
            "unsupported_parameter",
            "/chat_template_kwargs/enable_thinkin",
        ),
        (
            chat_tokenizer("empties"),
            {"chat_template_kwargs": {"messages": []}},
            "unsupported_parameter",
            "/chat_template_kwargs/messages",
        ),
        (
            chat_tokenizer("channels"),
            {"reasoning_effort": "low", "chat_template_kwargs": {"reasoning_effort": "high"}},
            "invalid_request",
            "/reasoning_effort",
        ),
        (
            chat_tokenizer("chatml"),
            {"continue_final_message": True, "add_generation_prompt": True},
            "invalid_request",
            "/continue_final_message",
        ),
        (
            WithoutTemplate(),
            {"add_special_tokens": True},
            "unsupported_parameter",
            "/add_special_tokens",
        ),
        (chat_tokenizer(None), {}, "no_chat_template", "/messages"),
        (
            chat_tokenizer("{{ raise_exception(messages[0].role) }}"),
            {},
            "invalid_messages",
            "/messages",
        ),
        # A content that the template drops cannot be continued.
        (
            chat_tokenizer("{{ messages[0].role }}"),
            {"continue_final_message": True},
            "invalid_messages",
            "/messages",
        ),
    ],
)
def test_what_would_change_nothing_is_refused(
    tokenizer: Any, fields: dict[str, Any], code: str, param: str
) -> None:
    with pytest.raises(SteerError) as caught:
        prompt(tokenizer, **fields)
    assert (caught.value.code, caught.value.param) == (code, param)


@pytest.mark.parametrize("name", ["reasoning_content", "reasoning"])
def test_thoughts_come_back_with_a_message_only_if_there_are_none(name: str) -> None:
    tokenizer = chat_tokenizer("chatml")
    for nothing in (None, ""):
        found = prompt(tokenizer, ASK, {**ANSWER, name: nothing}, ASK)
        assert found == prompt(tokenizer, ASK, ANSWER, ASK)
    with pytest.raises(ValueError, match=name):
        prompt(tokenizer, ASK, {**ANSWER, name: "hm"}, ASK)


async def sent(http: httpx.AsyncClient, engine: FakeEngine, url: str, body: Any) -> str:
    response = await http.post(url, json=body)
    assert response.status_code == 200, response.text
    return ByteTokenizer().decode(engine.seen[-1].prompt)


async def test_the_server_reads_the_fields(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    said = [ASK, ANSWER]
    found = await sent(http, engine, URL, chat(messages=said, continue_final_message=True))
    assert found == "<|bos|><|user|>who?<|assistant|>fox"
    found = await sent(http, engine, URL, chat(messages=said, add_generation_prompt=None))
    assert found == "<|bos|><|user|>who?<|assistant|>fox<|assistant|>"
    response = await http.post(URL, json=chat(reasoning_effort="none"))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "/reasoning_effort")


@pytest.mark.parametrize(
    ("fields", "prompt"),
    [
        ({"prompt": "hi"}, "<|bos|>hi"),
        ({"prompt": "hi", "add_special_tokens": False}, "hi"),
        ({"prompt": "<|bos|>hi"}, "<|bos|>hi"),
        ({"prompt": "<|bos|>hi", "add_special_tokens": False}, "<|bos|>hi"),
        ({"prompt": [256, 256, 104]}, "<|bos|><|bos|>h"),
    ],
)
async def test_a_completions_special_tokens(
    http: httpx.AsyncClient, engine: FakeEngine, fields: dict[str, Any], prompt: str
) -> None:
    body = {"model": "fake-model", **fields}
    assert await sent(http, engine, "/v1/completions", body) == prompt


async def test_ends_are_a_requests_own(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    whole = (await http.post(URL, json=chat())).json()
    text = whole["choices"][0]["message"]["content"]
    third = ord(text[2])
    cut = (await http.post(URL, json=chat(stop_token_ids=[third]))).json()["choices"][0]
    assert cut["finish_reason"] == "stop"
    assert cut["message"]["content"] == text[: text.index(chr(third))]
    endless = (await http.post(URL, json=chat(ignore_eos=True, max_tokens=200))).json()
    assert endless["choices"][0]["finish_reason"] == "length"
    response = await http.post(URL, json=chat(stop_token_ids=[10**6]))
    assert (response.status_code, response.json()["error"]["param"]) == (400, "/stop_token_ids")
