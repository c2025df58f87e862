"""Who asks with an X-Request-ID finds it again: in the answer, in errors, in the log."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import httpx
import openai
import pytest
from fastapi import FastAPI

from steer.engines.fake.controls import FakeFailure
from steer.engines.fake.engine import FakeEngine
from steer.errors import EngineError
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

URL = "/v1/chat/completions"
Body = Callable[..., dict[str, Any]]


@pytest.mark.parametrize("name", ["abc-1.2_3:4", "a" * 128, "2f1b/x+y==@host"])
async def test_the_clients_own_id_is_told_again(
    http: httpx.AsyncClient, chat: Body, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    caplog.set_level(logging.INFO, "steer.server")
    for path in ("/health", "/v1/models", "/nowhere"):
        assert (await http.get(path, headers={"X-Request-ID": name})).headers[
            "x-request-id"
        ] == name
    for body in (chat(), chat(stream=True), chat(n=0), chat(model="none")):
        response = await http.post(URL, json=body, headers={"X-Request-ID": name})
        assert response.headers.get_list("x-request-id") == [name]
        if response.is_error:
            assert response.json()["error"]["request_id"] == name
    assert sum(name in record.getMessage() for record in caplog.records) == 2


@pytest.mark.parametrize("name", [None, "", "a" * 129, "a b", 'a"b', "<b>", "a\tb", "é"])
async def test_another_one_is_made_where_it_is_missing_or_unsafe(
    http: httpx.AsyncClient, chat: Body, name: str | None
) -> None:
    headers = [] if name is None else [(b"x-request-id", name.encode())]
    made = set()
    for _ in range(2):
        response = await http.post(URL, json=chat(), headers=headers)
        made.add(response.headers["x-request-id"])
    assert len(made) == 2
    assert all(len(one) == 32 and one.isalnum() for one in made)


async def test_refusals_before_any_route_have_one(
    engine: FakeEngine, registry: Registry, in_process: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    settings = ServerSettings(api_key="secret", max_body_bytes=10)  # type: ignore[arg-type]
    async with in_process(create_app(engine, registry, settings)) as client:
        for key, status in (("wrong", 401), ("secret", 413)):
            headers = {"X-Request-ID": "mine", "Authorization": f"Bearer {key}"}
            response = await client.post(URL, json={"model": "x" * 20}, headers=headers)
            assert response.status_code == status
            assert response.headers["x-request-id"] == "mine"
            assert response.json()["error"]["request_id"] == "mine"


async def test_failures_that_nobody_expected_have_one(
    http: httpx.AsyncClient, chat: Body, engine: FakeEngine
) -> None:
    engine.failure = FakeFailure(error=RuntimeError("a bug"))
    response = await http.post(URL, json=chat(), headers={"X-Request-ID": "mine"})
    assert response.status_code == 500
    assert response.headers.get_list("x-request-id") == ["mine"]
    assert response.json()["error"]["request_id"] == "mine"


def test_openais_client_knows_it(client: openai.OpenAI, engine: FakeEngine, chat: Body) -> None:
    named = {"X-Request-ID": "mine"}
    body: Any = chat()
    assert client.chat.completions.create(**body, extra_headers=named)._request_id == "mine"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{**body, "top_p": 5}, extra_headers=named)
    assert caught.value.request_id == "mine"
    engine.failure = FakeFailure(after=1, error=EngineError("broken"))
    with pytest.raises(openai.APIError) as broken:
        list(client.chat.completions.create(**body, stream=True, extra_headers=named))
    assert broken.value.body["request_id"] == "mine"  # type: ignore[index]
