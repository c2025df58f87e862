"""Chat completions: sampling fields, choices, stop strings, log-probabilities, comparison."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import httpx
import pytest

from steer.engines.base import SamplingParams
from steer.engines.fake.engine import FakeEngine

URL = "/v1/chat/completions"
Body = Callable[..., dict[str, Any]]
Sse = Callable[[str], list[dict[str, Any]]]


async def answer(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    response = await http.post(URL, json=body)
    assert response.status_code == 200, response.text
    return response.json()


async def test_the_body_is_openais(http: httpx.AsyncClient, chat: Body) -> None:
    found = await answer(http, chat())
    assert found["object"] == "chat.completion"
    assert found["model"] == "fake-model"
    assert found["id"].startswith("chatcmpl-")
    (choice,) = found["choices"]
    assert choice["message"]["role"] == "assistant"
    assert choice["finish_reason"] == "stop"
    usage = found["usage"]
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
    assert "steering" not in found
    assert "default" not in found


async def test_choices_have_seeds_of_their_own(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    found = await answer(http, chat(temperature=1, seed=7, n=3))
    texts = [choice["message"]["content"] for choice in found["choices"]]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    assert len(set(texts)) == 3
    assert [request.sampling.seed for request in engine.seen] == [7, 8, 9]
    second = await answer(http, chat(temperature=1, seed=8))
    assert second["choices"][0]["message"]["content"] == texts[1]


async def test_the_largest_seed_has_successors(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    await answer(http, chat(seed=2**63 - 1, n=2))
    assert [request.sampling.seed for request in engine.seen] == [2**63 - 1, -(2**63)]


@pytest.mark.parametrize("name", ["max_tokens", "max_completion_tokens"])
async def test_the_limit_of_tokens_is_kept(http: httpx.AsyncClient, chat: Body, name: str) -> None:
    found = await answer(http, chat(**{name: 5}))
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["completion_tokens"] == 5


async def test_without_a_limit_the_context_is_the_limit(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    await answer(http, chat())
    (request,) = engine.seen
    assert request.sampling.max_tokens == engine.info.max_length - len(request.prompt)


async def test_a_stop_string_ends_the_text_before_it(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    whole = await answer(http, chat(steering=joy))
    text = whole["choices"][0]["message"]["content"]
    stop = text[4:8]
    found = await answer(http, chat(steering=joy, stop=["never", stop]))
    choice = found["choices"][0]
    assert choice["message"]["content"] == text[: text.index(stop)]
    assert choice["finish_reason"] == "stop"
    assert found["usage"]["completion_tokens"] < whole["usage"]["completion_tokens"]
    assert found["steering"]["tokens_steered"] == found["usage"]["total_tokens"] - 1


async def test_a_stop_string_across_chunks_is_never_sent(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], sse: Sse
) -> None:
    text = (await answer(http, chat(steering=joy)))["choices"][0]["message"]["content"]
    for stop in (text[1:6], text[-3:], text[2:3]):
        found = await http.post(URL, json=chat(steering=joy, stream=True, stop=stop))
        chunks = sse(found.text)
        pieces = [chunk["choices"][0]["delta"].get("content", "") for chunk in chunks]
        assert "".join(pieces) == text[: text.index(stop)]
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert chunks[-1]["steering"]["tokens_steered"] > 0


async def test_characters_of_several_bytes_arrive_whole(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], sse: Sse
) -> None:
    text = (await answer(http, chat(steering=joy)))["choices"][0]["message"]["content"]
    assert any(ord(character) > 0xFFFF for character in text), "the fake should use emoji here"
    found = await http.post(URL, json=chat(steering=joy, stream=True))
    pieces = [c["choices"][0]["delta"].get("content", "") for c in sse(found.text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces)


async def test_text_cut_inside_a_character_is_the_same_streamed(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], sse: Sse
) -> None:
    whole = [
        (await answer(http, chat(steering=joy, max_tokens=n)))["choices"][0]["message"]["content"]
        for n in range(1, 33)
    ]
    assert any(text.endswith("\ufffd") for text in whole)
    for n, text in enumerate(whole, start=1):
        found = await http.post(URL, json=chat(steering=joy, max_tokens=n, stream=True))
        pieces = [c["choices"][0]["delta"].get("content", "") for c in sse(found.text)]
        assert "".join(pieces) == text


async def test_a_streams_chunks_come_in_openais_order(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], sse: Sse
) -> None:
    body = chat(steering=joy, stream=True, n=2, max_tokens=4)
    response = await http.post(URL, json=body)
    assert response.headers["content-type"].startswith("text/event-stream")
    chunks = sse(response.text)
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk["id"] for chunk in chunks}) == 1
    opening = [chunk["choices"][0]["delta"] for chunk in chunks[:2]]
    assert opening == [{"role": "assistant", "content": ""}] * 2
    finished = [c["choices"][0]["index"] for c in chunks if c["choices"][0]["finish_reason"]]
    assert sorted(finished) == [0, 1]
    assert [("steering" in chunk) for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
    assert all("usage" not in chunk for chunk in chunks)


async def test_the_usage_chunk_is_last_and_carries_the_receipt(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], sse: Sse
) -> None:
    body = chat(steering=joy, stream=True, stream_options={"include_usage": True})
    *before, last = sse((await http.post(URL, json=body)).text)
    assert all(chunk["usage"] is None and "steering" not in chunk for chunk in before)
    assert last["choices"] == []
    assert last["usage"]["total_tokens"] - 1 == last["steering"]["tokens_steered"]


async def test_log_probabilities_belong_to_the_tokens(http: httpx.AsyncClient, chat: Body) -> None:
    found = await answer(http, chat(logprobs=True, top_logprobs=2, max_tokens=4))
    content = found["choices"][0]["logprobs"]["content"]
    text = found["choices"][0]["message"]["content"]
    assert "".join(entry["token"] for entry in content) == text
    for entry in content:
        assert bytes(entry["bytes"]).decode() == entry["token"]
        assert len(entry["top_logprobs"]) == 2
        assert entry["top_logprobs"][0]["logprob"] == entry["logprob"] < 0


async def test_parts_of_a_character_are_reported_as_bytes(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    found = await answer(http, chat(steering=joy, logprobs=True))
    content = found["choices"][0]["logprobs"]["content"]
    raw = bytes(byte for entry in content for byte in entry["bytes"])
    assert raw.decode() == found["choices"][0]["message"]["content"]
    assert any(entry["token"].startswith("bytes:\\x") for entry in content)


async def test_streamed_log_probabilities_are_the_same(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], sse: Sse
) -> None:
    body = chat(steering=joy, logprobs=True, top_logprobs=1)
    whole = (await answer(http, body))["choices"][0]["logprobs"]["content"]
    streamed = []
    for chunk in sse((await http.post(URL, json={**body, "stream": True})).text):
        logprobs = chunk["choices"][0].get("logprobs")
        streamed += logprobs["content"] if logprobs else []
    assert streamed == whole


async def test_compare_returns_the_default_answer_too(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    plain = await answer(http, chat(n=2))
    found = await answer(http, chat(steering=joy, compare=True, n=2))
    assert found["default"] == plain["choices"]
    assert found["choices"] == (await answer(http, chat(steering=joy, n=2)))["choices"]
    assert found["choices"] != found["default"]


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"n": 3, "temperature": 0.9, "seed": 5},
        {"stop": ["ab", "e"], "n": 2, "temperature": 0.9, "seed": 5},
        {"logprobs": True, "top_logprobs": 1},
    ],
)
@pytest.mark.parametrize("usage", [{}, {"stream_options": {"include_usage": True}}])
async def test_compare_streams_both_answers_side_by_side(
    http: httpx.AsyncClient,
    chat: Body,
    joy: dict[str, Any],
    sse: Sse,
    fields: dict[str, Any],
    usage: dict[str, Any],
) -> None:
    """What a client that knows nothing of `default` puts together is the steered answer; the
    receipt is one, on the last chunk, and counts nothing of the other."""
    body = chat(steering=joy, compare=True, **fields)
    whole = await answer(http, body)
    chunks = sse((await http.post(URL, json={**body, "stream": True, **usage})).text)
    assert all(not chunk["choices"] for chunk in chunks if "default" in chunk)
    assert gathered(chunks, "choices") == shown(whole["choices"])
    assert gathered(chunks, "default") == shown(whole["default"])
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]}
    assert ["steering" in chunk for chunk in chunks].index(True) == len(chunks) - 1
    assert chunks[-1]["steering"] == whole["steering"]
    if usage:
        assert chunks[-1]["usage"] == whole["usage"]
    order = ["default" in chunk for chunk in chunks]
    changes = sum(one != other for one, other in pairwise(order))
    assert changes > 2  # they come by turns, not one behind the other


def gathered(chunks: list[dict[str, Any]], field: str) -> list[tuple[Any, ...]]:
    """The text, end and log-probabilities of each choice of a stream."""
    found: dict[int, list[Any]] = {}
    for chunk in chunks:
        for choice in chunk.get(field, ()):
            mine = found.setdefault(choice["index"], ["", None, []])
            mine[0] += choice["delta"].get("content") or ""
            mine[1] = choice["finish_reason"] or mine[1]
            mine[2] += (choice.get("logprobs") or {}).get("content") or []
    return [tuple(found[index]) for index in sorted(found)]


def shown(choices: list[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """The same of whole choices."""
    return [
        (
            one["message"]["content"],
            one["finish_reason"],
            (one.get("logprobs") or {}).get("content") or [],
        )
        for one in choices
    ]


async def test_a_compared_stream_is_read_for_its_steered_answer_alone(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any], sse: Sse
) -> None:
    body = chat(steering=joy, compare=True, inspect={"norms": [1]}, stream=True)
    chunks = sse((await http.post(URL, json=body)).text)
    entries = [e for c in chunks for e in c.get("steering", {}).get("readouts", [])]
    places = [one["position"] for one in entries]
    assert places
    assert places == sorted(set(places))


async def test_sizes_are_measured_only_when_asked_for(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    basic = await answer(http, chat(steering=joy))
    full = await answer(http, chat(steering=joy, receipt="full"))
    assert all("relative_size" not in p for p in basic["steering"]["hook_points"])
    assert [p["relative_size"] for p in full["steering"]["hook_points"]] == [0.125, 0.125]


async def test_a_spec_for_generated_tokens_only_is_counted_so(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    found = await answer(http, chat(steering={**joy, "where": {"phases": ["generation"]}}))
    assert found["steering"]["tokens_steered"] == found["usage"]["completion_tokens"] - 1
    assert found["steering"]["tokens_skipped"] == found["usage"]["prompt_tokens"]


async def test_strength_zero_is_the_default_answer(http: httpx.AsyncClient, chat: Body) -> None:
    zero = {"interventions": [{"kind": "add", "vector": "joy", "strength": 0}]}
    steered = await answer(http, chat(steering=zero))
    assert steered["steering"]["hook_points"] == []


async def test_a_gate_appears_in_the_receipt(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    gated = {**joy, "when": {"vector": "joy", "above": 0.1, "layer": 2, "scope": "token"}}
    found = await answer(http, chat(steering=gated))
    (gate,) = found["steering"]["gates"]
    assert gate["name"] == "joy"
    assert gate["fired"] > 0


@pytest.mark.parametrize(
    "fields",
    [
        {"user": "u", "metadata": {"a": "b"}, "store": False},
        {"store": True, "parallel_tool_calls": True, "tools": [], "tool_choice": "none"},
        {"parallel_tool_calls": False, "logprobs": False, "top_logprobs": 0},
        {"top_k": -1, "min_p": 0, "repetition_penalty": 1, "stop": ""},
        {"top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0, "stop": [], "n": 1.0},
        {"top_k": -1.0, "top_p": 1, "seed": None, "presence_penalty": None, "logit_bias": {"5": 0}},
        {"max_tokens": 64.0, "max_completion_tokens": 64, "top_logprobs": None},
        {"min_tokens": 0, "stop_token_ids": [], "ignore_eos": False, "bad_words": []},
        {"include_stop_str_in_output": False, "skip_special_tokens": True, "echo": False},
        {"use_beam_search": False, "length_penalty": 1.0, "prompt_logprobs": None},
        {"spaces_between_special_tokens": True, "allowed_token_ids": None, "priority": 0},
        {"receipt": None, "compare": None, "extra_body": {}, "invented": None},
        {"prompt_cache_retention": "in_memory", "verbosity": "medium", "modalities": ["text"]},
        {"tools": None, "tool_choice": "auto", "functions": [], "response_format": None},
        {"frequency_penalty": 0, "presence_penalty": 0.0, "logit_bias": {}, "n": None},
        {"response_format": {"type": "text"}, "service_tier": "auto", "stop": None},
        {"prompt_cache_key": "k", "safety_identifier": "s", "parallel_tool_calls": None},
        {"inspect": None, "steering": None, "stream_options": None, "stream": False},
    ],
)
async def test_fields_that_ask_for_nothing_are_accepted(
    http: httpx.AsyncClient, chat: Body, fields: dict[str, Any]
) -> None:
    plain = await answer(http, chat())
    assert (await answer(http, chat(**fields)))["choices"] == plain["choices"]


async def test_what_tokens_are_chosen_by_reaches_the_engine(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    await answer(
        http,
        chat(
            min_p=0.1,
            presence_penalty=0.5,
            frequency_penalty=-1,
            repetition_penalty=1.2,
            logit_bias={"5": 2, "7": -100},
            min_tokens=3,
            stop_token_ids=[9],
            ignore_eos=True,
            max_tokens=20,
        ),
    )
    assert engine.seen[-1].sampling == SamplingParams(
        max_tokens=20,
        temperature=0,
        min_p=0.1,
        presence_penalty=0.5,
        frequency_penalty=-1.0,
        repetition_penalty=1.2,
        logit_bias=((5, 2.0), (7, -100.0)),
        min_tokens=3,
        stop_token_ids=frozenset({9}),
        ignore_eos=True,
    )


async def test_stop_strings_and_stop_tokens_stay_where_asked_for(
    http: httpx.AsyncClient, chat: Body
) -> None:
    text = (await answer(http, chat()))["choices"][0]["message"]["content"]
    stop = text[4:7]
    end = text.index(stop)
    for fields in ({"stop": stop}, {"stop_token_ids": [ord(stop[-1])], "min_tokens": end + 2}):
        for keep in (False, True):
            found = await answer(http, chat(include_stop_str_in_output=keep, **fields))
            (choice,) = found["choices"]
            cut = end if "stop" in fields else end + 2
            assert choice["message"]["content"] == text[: end + 3 if keep else cut]
            assert choice["finish_reason"] == "stop"


async def test_vllms_running_counts_of_tokens(
    http: httpx.AsyncClient, chat: Body, sse: Sse
) -> None:
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = chat(stream=True, stream_options=options, max_tokens=5)
    chunks = sse((await http.post(URL, json=body)).text)
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == [0, 1, 2, 3, 4, 5, 5, 5]


async def test_earlier_answers_can_be_sent_back(http: httpx.AsyncClient, chat: Body) -> None:
    first = await answer(http, chat())
    turns = [
        {
            "role": "developer",
            "content": [{"type": "text", "text": "Be "}, {"type": "text", "text": "brief."}],
        },
        {"role": "user", "content": "How are you?"},
        {**first["choices"][0]["message"], "tool_calls": None, "audio": None, "annotations": []},
        {"role": "user", "content": "And now?"},
    ]
    found = await answer(http, chat(messages=turns))
    assert found["choices"][0]["message"]["content"] != first["choices"][0]["message"]["content"]


async def test_the_prompt_is_read_through_the_logit_lens(
    http: httpx.AsyncClient, chat: Body, joy: dict[str, Any]
) -> None:
    spec = {"layers": [1, 4], "positions": [0, -1], "top": 3}
    plain = (await answer(http, chat(inspect=spec)))["inspect"]
    steered = (await answer(http, chat(inspect=spec, steering=joy)))["inspect"]
    assert plain["layers"] == [1, 4]
    assert plain["positions"][0] == 0
    assert len(plain["positions"]) == 2
    assert [len(cell["top"]) for cell in plain["cells"]] == [3] * 4
    assert steered["cells"][:2] == plain["cells"][:2]  # layer 1, before the edit
    assert steered["cells"][2:] != plain["cells"][2:]
