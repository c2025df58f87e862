"""OpenAI's own client against a real port."""

from __future__ import annotations

import asyncio
import json
import socket
from typing import Any

import httpx
import openai
import pytest
from liveness import LIVENESS_SECONDS

from steer.engines.fake.controls import FakeFailure, Stepper
from steer.engines.fake.engine import FakeEngine
from steer.errors import EngineError

MESSAGES: Any = [{"role": "user", "content": "How are you?"}]


def ask(client: openai.OpenAI, **more: Any) -> Any:
    return client.chat.completions.create(
        model="fake-model", messages=MESSAGES, temperature=0, **more
    )


def test_a_steered_answer_differs_and_has_a_receipt(
    client: openai.OpenAI, joy: dict[str, Any]
) -> None:
    default = ask(client)
    steered = ask(client, extra_body={"steering": joy})
    assert default.choices[0].message.content
    assert steered.choices[0].message.content != default.choices[0].message.content
    assert "steering" not in default.model_extra
    receipt = steered.model_extra["steering"]
    assert receipt["tokens_steered"] == steered.usage.total_tokens - 1
    assert receipt["tokens_skipped"] == 0
    assert [(p["layer"], p["site"]) for p in receipt["hook_points"]] == [
        (2, "resid_post"),
        (3, "resid_post"),
    ]


def test_a_stream_gives_the_same_answer_and_receipt(
    client: openai.OpenAI, joy: dict[str, Any]
) -> None:
    whole = ask(client, extra_body={"steering": joy})
    chunks = list(
        ask(
            client,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"steering": joy},
        )
    )
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert text == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].usage == whole.usage
    assert chunks[-1].model_extra["steering"] == whole.model_extra["steering"]


def test_plain_completions_work(client: openai.OpenAI, joy: dict[str, Any]) -> None:
    whole = client.completions.create(
        model="fake-model", prompt="Once", temperature=0, max_tokens=9, extra_body={"steering": joy}
    )
    stream = client.completions.create(
        model="fake-model",
        prompt="Once",
        temperature=0,
        max_tokens=9,
        stream=True,
        extra_body={"steering": joy},
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole.choices[0].text
    assert chunks[-1].model_extra is not None
    assert whole.model_extra is not None
    assert chunks[-1].model_extra["steering"] == whole.model_extra["steering"]


def test_an_uploaded_vector_steers_the_next_request(client: openai.OpenAI, live: str) -> None:
    url = f"{live}/v1/steering/vectors"
    content = httpx.get(f"{url}/joy/content", timeout=LIVENESS_SECONDS).content
    answer = httpx.post(
        url, files={"file": ("mine.safetensors", content)}, timeout=LIVENESS_SECONDS
    )
    assert answer.status_code == 201
    steered = ask(
        client, extra_body={"steering": {"interventions": [{"kind": "add", "vector": "mine"}]}}
    )
    assert steered.model_extra["steering"]["tokens_steered"] > 0


def test_the_clients_exceptions_carry_code_and_param(client: openai.OpenAI) -> None:
    wrong = {"interventions": [{"kind": "add", "vector": "missing"}]}
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, extra_body={"steering": wrong})
    assert caught.value.code == "unknown_vector"
    assert caught.value.param == "/steering/interventions/0/vector"
    assert "joy" in caught.value.message
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, tools=[{"type": "function", "function": {"name": "f"}}])
    assert refused.value.param == "/tools"


def test_a_failure_while_streaming_reaches_the_client(
    client: openai.OpenAI, engine: FakeEngine
) -> None:
    engine.failure = FakeFailure(after=3, error=EngineError("the fake engine broke"))
    received: list[Any] = []
    with pytest.raises(openai.APIError, match="the fake engine broke"):
        received.extend(ask(client, stream=True))
    assert len(received) == 4  # the role and three tokens
    engine.failure = None
    assert ask(client).choices[0].message.content


def test_closing_a_stream_cancels_the_generation(
    client: openai.OpenAI, engine: FakeEngine, stepper: Stepper, joy: dict[str, Any]
) -> None:
    stream = ask(client, stream=True, extra_body={"steering": joy})
    stepper.allow(2)
    read = iter(stream)
    assert next(read).choices[0].delta.role == "assistant"
    assert next(read).choices[0].delta.content
    assert engine.stats().slots_in_use == 1
    stream.close()
    assert engine.wait_for("cancelled", timeout=LIVENESS_SECONDS)
    assert engine.stats().slots_in_use == 0


def test_leaving_before_the_answer_cancels_the_generation(
    live: str, engine: FakeEngine, stepper: Stepper
) -> None:
    body = json.dumps({"model": "fake-model", "messages": MESSAGES, "n": 3}).encode()
    address = httpx.URL(live)
    with socket.create_connection((address.host, address.port or 80)) as connection:
        connection.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nhost: localhost\r\n"
            b"content-type: application/json\r\n"
            + f"content-length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert engine.wait_for("started", 3, LIVENESS_SECONDS)
    assert engine.wait_for("cancelled", 3, LIVENESS_SECONDS)
    assert engine.counts["finished"] == 0


def test_the_models_list_holds_profiles_which_can_be_used(
    client: openai.OpenAI, live: str, joy: dict[str, Any]
) -> None:
    saved = httpx.post(
        f"{live}/v1/steering/profiles",
        json={"name": "cheerful", "spec": joy},
        timeout=LIVENESS_SECONDS,
    )
    assert saved.status_code == 200
    assert [model.id for model in client.models.list()] == ["fake-model", "fake-model:cheerful"]
    assert client.models.retrieve("fake-model:cheerful").owned_by == "steer"
    by_profile = client.chat.completions.create(
        model="fake-model:cheerful", messages=MESSAGES, temperature=0
    )
    by_spec = ask(client, extra_body={"steering": joy})
    assert by_profile.choices == by_spec.choices
    assert by_profile.model == "fake-model:cheerful"


async def test_many_different_requests_at_once_equal_one_at_a_time(
    live: str, joy: dict[str, Any]
) -> None:
    calm = {"interventions": [{"kind": "add", "vector": "calm"}]}
    bodies = [{"extra_body": {"steering": spec}} if spec else {} for spec in (None, joy, calm)]
    async with openai.AsyncOpenAI(base_url=f"{live}/v1", api_key="none") as client:

        async def one(place: int) -> str | None:
            found = await client.chat.completions.create(
                model="fake-model",
                messages=[{"role": "user", "content": f"Question {place // 3}"}],
                temperature=0,
                **bodies[place % 3],  # type: ignore[arg-type]
            )
            return found.choices[0].message.content

        together = await asyncio.gather(*(one(place) for place in range(24)))
        alone = [await one(place) for place in range(24)]
    assert together == alone
