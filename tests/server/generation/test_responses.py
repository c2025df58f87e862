"""POST /v1/responses, by OpenAI's own client against a live server, and in process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from steer.engines.fake.controls import FakeFailure
from steer.engines.fake.engine import FakeEngine
from steer.errors import EngineError

URL = "/v1/responses"
Body = Callable[..., dict[str, Any]]
ORDER = [
    "response.created",
    "response.in_progress",
    "response.output_item.added",
    "response.content_part.added",
    "response.output_text.delta",
    "response.output_text.done",
    "response.content_part.done",
    "response.output_item.done",
    "response.completed",
]


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.responses.create(
        **{"model": "fake-model", "input": "How are you?", "temperature": 0, **more}
    )


async def answer(http: httpx.AsyncClient, **fields: Any) -> dict[str, Any]:
    body = {"model": "fake-model", "input": "How are you?", "temperature": 0, **fields}
    response = await http.post(URL, json=body)
    assert response.status_code == 200, response.text
    return response.json()


def test_the_client_reads_the_answer_and_its_receipt(
    client: openai.OpenAI, joy: dict[str, Any]
) -> None:
    plain = ask(client)
    assert isinstance(plain, Response)
    assert plain.status == "completed"
    assert plain.id.startswith("resp_")
    assert plain.output[0].id.startswith("msg_")
    assert "steering" not in plain.model_extra
    chat = client.chat.completions.create(
        model="fake-model", messages=[{"role": "user", "content": "How are you?"}], temperature=0
    )
    assert plain.output_text == chat.choices[0].message.content
    assert plain.usage.input_tokens == chat.usage.prompt_tokens
    assert plain.usage.output_tokens == chat.usage.completion_tokens
    steered = ask(client, extra_body={"steering": joy})
    assert steered.output_text != plain.output_text
    assert steered.model_extra["steering"]["tokens_steered"] == steered.usage.total_tokens - 1


def test_a_stream_has_openais_events_in_their_order(
    client: openai.OpenAI, joy: dict[str, Any]
) -> None:
    options = {"include": ["message.output_text.logprobs"], "top_logprobs": 2}
    whole = ask(client, extra_body={"steering": joy}, **options)
    events = list(ask(client, stream=True, extra_body={"steering": joy}, **options))
    assert [event.sequence_number for event in events] == list(range(len(events)))
    assert list(dict.fromkeys(event.type for event in events)) == ORDER
    deltas = [event for event in events if event.type == "response.output_text.delta"]
    assert len(deltas) > 3
    assert "".join(event.delta for event in deltas) == whole.output_text
    told = [one.logprob for event in deltas for one in event.logprobs]
    assert told == [one.logprob for one in whole.output[0].content[0].logprobs]
    last = events[-1].response
    assert last.output_text == whole.output_text
    assert last.usage == whole.usage
    assert last.model_extra["steering"] == whole.model_extra["steering"]


def test_the_clients_own_streaming_helper_works(client: openai.OpenAI) -> None:
    with client.responses.stream(model="fake-model", input="How are you?", temperature=0) as stream:
        final = stream.get_final_response()
    assert final.output_text == ask(client).output_text


async def test_every_event_is_one_that_openais_types_know(http: httpx.AsyncClient) -> None:
    known: TypeAdapter[Any] = TypeAdapter(ResponseStreamEvent)
    body = {"model": "fake-model", "input": "Hi", "stream": True, "max_output_tokens": 3}
    text = (await http.post(URL, json=body)).text
    *events, end = text.split("\n\n")
    assert end == ""
    for event in events:
        head, data = event.split("\n")
        found = known.validate_json(data.removeprefix("data: "))
        assert head == f"event: {found.type}"
    assert found.type == "response.incomplete"
    assert found.response.incomplete_details.reason == "max_output_tokens"
    Response.model_validate(await answer(http))


def test_conversations_are_sent_whole(client: openai.OpenAI, engine: FakeEngine) -> None:
    first = ask(client, instructions="Be brief.")
    turns: list[Any] = [
        {"role": "user", "content": [{"type": "input_text", "text": "How are you?"}]},
        *(item.model_dump() for item in first.output),
        {"type": "message", "role": "user", "content": "And now?"},
    ]
    second = ask(client, instructions="Be brief.", input=turns)
    prompt = engine.seen[-1].prompt
    messages: list[Any] = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How are you?"},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": "And now?"},
    ]
    chat = client.chat.completions.create(model="fake-model", messages=messages, temperature=0)
    assert engine.seen[-1].prompt == prompt
    assert second.output_text == chat.choices[0].message.content


@pytest.mark.parametrize(
    "fields",
    [
        {"store": True, "tools": [], "tool_choice": "auto", "parallel_tool_calls": True},
        {
            "store": False,
            "include": ["reasoning.encrypted_content"],
            "truncation": "disabled",
            "background": False,
        },
        {"reasoning": {"effort": None, "summary": None}, "previous_response_id": None},
        {"text": {"format": {"type": "text"}, "verbosity": "medium"}, "metadata": {"a": "b"}},
        {
            "text": {"format": None},
            "stream_options": {"include_obfuscation": False},
            "prompt": None,
        },
        {"service_tier": "auto", "user": "u", "max_output_tokens": 64.0, "top_logprobs": 0},
        {"input": [{"role": "user", "content": "How are you?", "status": None}]},
    ],
)
async def test_fields_that_ask_for_nothing_are_accepted(
    http: httpx.AsyncClient, fields: dict[str, Any]
) -> None:
    plain = await answer(http)
    found = await answer(http, **fields)
    assert found["output"][0]["content"] == plain["output"][0]["content"]
    assert found["store"] is False


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "/previous_response_id"),
        ({"conversation": "conv_1"}, "/conversation"),
        ({"background": True}, "/background"),
        ({"tools": [{"type": "web_search"}]}, "/tools"),
        ({"tool_choice": "required"}, "/tool_choice"),
        ({"reasoning": {"effort": "high"}}, "/reasoning"),
        ({"text": {"format": {"type": "wrong"}}}, "/text/format"),
        ({"truncation": "auto"}, "/truncation"),
        ({"include": ["file_search_call.results"]}, "/include/0"),
        ({"max_output_tokens": 0}, "/max_output_tokens"),
        ({"max_tokens": 5}, "/max_tokens"),
        ({"messages": []}, "/messages"),
        ({"n": 2}, "/n"),
        ({"input": []}, "/input"),
        ({"input": 5}, "/input"),
        ({"input": None}, "/input"),
        ({"input": [{"type": "function_call_output", "output": "x"}]}, "/input"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "/input/0/content"),
        ({"input": [{"role": "tool", "content": "x"}]}, "/input/0/role"),
        ({"instructions": 5}, "/instructions"),
        ({"steering": {"interventions": []}}, "/steering/interventions"),
        ({"stream": True, "compare": True}, "/compare"),
    ],
)
async def test_what_is_not_possible_is_refused_by_name(
    http: httpx.AsyncClient, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "fake-model", "input": "Hi", **fields}
    response = await http.post(URL, json=body)
    assert response.status_code == 400, response.text
    assert response.json()["error"]["param"] == param


async def test_compare_and_inspect_are_answered_beside(
    http: httpx.AsyncClient, joy: dict[str, Any]
) -> None:
    plain = await answer(http)
    found = await answer(http, steering=joy, compare=True, inspect={"layers": [4]})
    assert found["default"][0]["content"] == plain["output"][0]["content"]
    assert found["inspect"]["layers"] == [4]


def test_a_failure_while_streaming_reaches_the_client(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.failure = FakeFailure(after=3, error=EngineError("the fake engine broke"))
    received: list[Any] = []
    with pytest.raises(openai.APIError, match="the fake engine broke"):
        received.extend(ask(client, stream=True))
    assert [event.type for event in received][-1] == "response.output_text.delta"
