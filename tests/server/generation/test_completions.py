"""Plain completions."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import FakeEngine
from steer.engines.fake.tokenizer import ByteTokenizer

URL = "/v1/completions"


async def answer(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "fake-model", "prompt": "Once", "temperature": 0, **fields}
    response = await http.post(URL, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_default_limit_is_sixteen_tokens(http: httpx.AsyncClient) -> None:
    found = await answer(http)
    assert found["object"] == "text_completion"
    assert found["usage"]["completion_tokens"] == 16
    assert found["choices"][0]["finish_reason"] == "length"


async def test_prompts_come_as_text_or_tokens_one_or_many(
    http: httpx.AsyncClient, engine: FakeEngine
) -> None:
    ids = ByteTokenizer().encode("Once")
    one = (await answer(http))["choices"]
    assert (await answer(http, prompt=ids))["choices"] == one
    many = await answer(http, prompt=["Once", "Twice"], n=2)
    assert [choice["index"] for choice in many["choices"]] == [0, 1, 2, 3]
    assert many["choices"][0]["text"] == many["choices"][1]["text"] == one[0]["text"]
    assert many["choices"][2]["text"] != one[0]["text"]
    assert (await answer(http, prompt=[ids, ids]))["choices"][1]["text"] == one[0]["text"]
    both = len(ids) + len(ByteTokenizer().encode("Twice"))
    assert many["usage"]["prompt_tokens"] == both


async def test_log_probabilities_come_in_the_older_form(http: httpx.AsyncClient) -> None:
    found = (await answer(http, logprobs=2, max_tokens=6))["choices"][0]
    logprobs = found["logprobs"]
    assert "".join(logprobs["tokens"]) == found["text"]
    assert logprobs["text_offset"] == list(range(6))
    assert all(len(top) == 2 for top in logprobs["top_logprobs"])
    assert len(logprobs["token_logprobs"]) == 6


async def test_streams_have_the_same_text_and_offsets(
    http: httpx.AsyncClient, sse: Any, joy: dict[str, Any]
) -> None:
    fields = {"logprobs": 1, "max_tokens": 30, "steering": joy}
    whole = (await answer(http, **fields))["choices"][0]
    body = {"model": "fake-model", "prompt": "Once", "temperature": 0, "stream": True, **fields}
    chunks = sse((await http.post(URL, json=body)).text)
    assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == whole["text"]
    tokens = [c["choices"][0]["logprobs"] for c in chunks if c["choices"][0]["logprobs"]]
    assert [t for part in tokens for t in part["tokens"]] == whole["logprobs"]["tokens"]
    assert chunks[-1]["steering"]["tokens_steered"] > 0


async def test_compare_and_receipts_cover_all_prompts(
    http: httpx.AsyncClient, joy: dict[str, Any]
) -> None:
    found = await answer(http, prompt=["Once", "Twice"], steering=joy, compare=True)
    plain = await answer(http, prompt=["Once", "Twice"])
    assert found["default"] == plain["choices"]
    # One token of each sequence is never fed back.
    assert found["steering"]["tokens_steered"] == found["usage"]["total_tokens"] - 2


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"echo": 3}, "/echo"),
        ({"suffix": "x"}, "/suffix"),
        ({"best_of": 3}, "/best_of"),
        ({"best_of": 3, "n": 2}, "/best_of"),
        ({"max_tokens": -1}, "/max_tokens"),
        ({"logprobs": 21}, "/logprobs"),
        ({"prompt": []}, "/prompt"),
        ({"prompt": [999_999]}, "/prompt"),
        ({"prompt": [1, "a"]}, "/prompt/0"),
        ({"prompt": {"a": 1}}, "/prompt"),
        ({"prompt": "\ud800"}, "/prompt"),
        ({"prompt": ["a"] * 65}, "/prompt"),
        ({"prompt": ["a"] * 10, "n": 10}, "/n"),
    ],
)
async def test_what_is_not_possible_is_refused(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "fake-model", "prompt": "Once", **fields}
    headers = {"content-type": "application/json"}
    response = await http.post(URL, content=json.dumps(body), headers=headers)
    assert response.status_code in (400, 413), response.text
    assert response.json()["error"]["param"] == param


@pytest.mark.parametrize(
    "fields",
    [
        {"best_of": 1, "suffix": "", "echo": False, "logprobs": False},
        {"best_of": 2, "n": 2, "suffix": None, "logit_bias": None, "user": ""},
        {"response_format": {"type": "text"}, "max_tokens": 8.0, "stop": ""},
    ],
)
async def test_fields_that_ask_for_nothing_are_accepted(
    http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    plain = await answer(http, max_tokens=8)
    assert (await answer(http, **{"max_tokens": 8, **fields}))["choices"][0] == plain["choices"][0]


@pytest.mark.parametrize("steered", [False, True])
async def test_a_prompt_is_echoed_with_its_log_probabilities(
    http: httpx.AsyncClient, engine: FakeEngine, joy: dict[str, Any], steered: bool
) -> None:
    ids = ByteTokenizer().encode("Once upon")
    fields = {"logprobs": 2, "max_tokens": 4, **({"steering": joy} if steered else {})}
    plain = (await answer(http, prompt="Once upon", **fields))["choices"][0]
    for prompt in ("Once upon", ids):
        (choice,) = (await answer(http, prompt=prompt, echo=True, **fields))["choices"]
        assert choice["text"].endswith("Once upon" + plain["text"])
        logprobs = choice["logprobs"]
        assert len(logprobs["tokens"]) == len(ids) + 4
        assert logprobs["token_logprobs"][0] is logprobs["top_logprobs"][0] is None
        assert logprobs["token_logprobs"][len(ids) :] == plain["logprobs"]["token_logprobs"]
        lists = [logprobs[name] for name in ("tokens", "token_logprobs", "top_logprobs")]
        own = zip(*lists, strict=True)
        assert all(top[token] == value for token, value, top in list(own)[1 : len(ids)])
        assert "".join(logprobs["tokens"]).endswith("Once upon" + plain["text"])
    captured = engine.capture(CaptureRequest([ids], plans=[engine.seen[-1].plan], logprobs=2))[
        0
    ].logprobs
    assert logprobs["token_logprobs"][1 : len(ids)] == [one.logprob for one in captured]
    assert (engine.seen[-1].plan is not None) is steered


async def test_texts_are_scored_as_evaluation_harnesses_do(
    http: httpx.AsyncClient, joy: dict[str, Any]
) -> None:
    """lm-evaluation-harness: token ids, echoed with one alternative, of which it drops the last."""
    prompts = [ByteTokenizer().encode(text) for text in ("Rain falls", "The river")]
    body = {"prompt": prompts, "echo": True, "logprobs": 1, "seed": 1234, "steering": joy}
    one = await answer(http, max_tokens=1, **body)
    none = await answer(http, max_tokens=0, **body)
    for ids, asked, silent in zip(prompts, one["choices"], none["choices"], strict=True):
        assert silent["finish_reason"] == "length"
        for name in ("tokens", "token_logprobs", "top_logprobs", "text_offset"):
            assert silent["logprobs"][name] == asked["logprobs"][name][: len(ids)]
    fed = sum(map(len, prompts))
    assert none["usage"]["completion_tokens"] == 0
    assert none["usage"]["prompt_tokens"] == fed == none["steering"]["tokens_steered"]


async def test_an_echo_of_both_answers_is_of_both_models(
    http: httpx.AsyncClient, joy: dict[str, Any]
) -> None:
    fields = {"echo": True, "logprobs": 0, "max_tokens": 3}
    both = await answer(http, steering=joy, compare=True, **fields)
    assert both["default"] == (await answer(http, **fields))["choices"]
    assert both["choices"] == (await answer(http, steering=joy, **fields))["choices"]
    assert both["choices"][0]["logprobs"] != both["default"][0]["logprobs"]


async def test_a_streamed_echo_comes_first(http: httpx.AsyncClient, sse: Any) -> None:
    fields = {"echo": True, "logprobs": 1, "max_tokens": 6}
    whole = (await answer(http, **fields))["choices"][0]
    body = {"model": "fake-model", "prompt": "Once", "temperature": 0, "stream": True, **fields}
    chunks = [chunk["choices"][0] for chunk in sse((await http.post(URL, json=body)).text)]
    assert chunks[0]["text"] == "Once"
    assert "".join(chunk["text"] for chunk in chunks) == whole["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        parts = [chunk["logprobs"][name] for chunk in chunks if chunk["logprobs"]]
        assert [one for part in parts for one in part] == whole["logprobs"][name]
