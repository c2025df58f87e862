"""Plain completions."""

from __future__ import annotations

import json
from typing import Any

import httpx
import pytest

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
        ({"echo": True}, "/echo"),
        ({"suffix": "x"}, "/suffix"),
        ({"best_of": 3}, "/best_of"),
        ({"logprobs": 6}, "/logprobs"),
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
