"""Who may use a server: keys, hosts, origins, and what is written about those turned away."""

from __future__ import annotations

import logging
from argparse import Namespace
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from fastapi.responses import PlainTextResponse
from pydantic import SecretStr

from steer.engines.fake.engine import FakeEngine
from steer.errors import SteerError
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.serve import refuse_open_door
from steer_server.settings import ServerSettings
from steer_server.vllm.doors import add_doors, keys_of

Connect = Callable[[FastAPI], httpx.AsyncClient]
VECTORS = "/v1/steering/vectors"
FILE = {"file": ("x.safetensors", b"not one")}
KEY = {"authorization": "Bearer secret"}


@pytest.fixture
def serve(registry: Registry, in_process: Connect) -> Callable[..., httpx.AsyncClient]:
    """A client of a server with these settings."""
    return lambda **given: in_process(create_app(FakeEngine(), registry, ServerSettings(**given)))


async def asks(client: httpx.AsyncClient, **headers: str) -> tuple[int, str]:
    """Status and code of an upload with these headers, which a page's form could send."""
    response = await client.post(VECTORS, files=FILE, headers=headers)
    return response.status_code, response.json()["error"]["code"]


READ = (400, "unknown_format")
"""The upload was let in, and is no vector."""
FOREIGN = (403, "foreign_origin")


@pytest.mark.parametrize(
    ("headers", "answer"),
    [
        ({}, READ),
        ({"host": "127.0.0.1:8000"}, READ),
        ({"host": "[::1]:8000"}, READ),
        ({"host": "192.168.1.7"}, READ),
        ({"host": "localhost."}, READ),
        ({"host": "app.localhost:8000"}, READ),
        ({"host": "LOCALHOST:8000", "origin": "http://localhost:8000"}, READ),
        ({"host": "localhost", "origin": "http://localhost:80"}, READ),
        ({"host": "evil.example"}, FOREIGN),
        ({"host": "localhost.evil.example"}, FOREIGN),
        ({"host": "127.0.0.1.evil.example"}, FOREIGN),
        ({"host": "evil.example:8000", "origin": "http://evil.example:8000"}, FOREIGN),
        ({"host": "localhost:notaport"}, FOREIGN),
        ({"origin": "http://evil.example"}, FOREIGN),
        ({"origin": "null"}, FOREIGN),
        ({"origin": "file://"}, FOREIGN),
        ({"host": "localhost:8000", "origin": "http://localhost:3000"}, FOREIGN),
        ({"host": "localhost:8000", "origin": "http://localhost:8000.evil.example"}, FOREIGN),
    ],
)
async def test_a_server_without_a_key_answers_its_own_pages_alone(
    serve: Callable[..., httpx.AsyncClient], headers: dict[str, str], answer: tuple[int, str]
) -> None:
    async with serve() as client:
        assert await asks(client, **headers) == answer


async def test_what_is_named_is_let_in(serve: Callable[..., httpx.AsyncClient]) -> None:
    page = "https://console.example"
    async with serve(allowed_hosts=("Steer",), allowed_origins=(page + "/",)) as client:
        assert await asks(client, host="steer:8000", origin=page) == READ
        assert await asks(client, host="other", origin=page) == FOREIGN
        assert await asks(client, origin="http://console.example") == FOREIGN
    async with serve(allowed_origins=(page,)) as client:
        shown = await client.get("/v1/models", headers={"origin": page})
        assert shown.headers["access-control-allow-origin"] == page
    async with serve(allowed_hosts=("*",), allowed_origins=("*",)) as client:
        assert await asks(client, host="anything.example", origin="https://other.example") == READ


async def test_with_a_key_the_key_alone_decides(serve: Callable[..., httpx.AsyncClient]) -> None:
    async with serve(api_key=SecretStr("secret")) as client:
        foreign = {"host": "steer.example", "origin": "https://console.example"}
        assert await asks(client, **foreign, **KEY) == READ
        assert await asks(client, authorization="bearer  secret") == READ
        for wrong in ("", "secret", "Bearer", "Bearer secrets", "Basic secret"):
            assert await asks(client, authorization=wrong) == (401, "invalid_api_key")


async def test_refusals_are_counted_and_logged(
    serve: Callable[..., httpx.AsyncClient], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "steer.access")
    async with serve(api_key=SecretStr("secret")) as client:
        await client.get("/v1/models?q=private")
        await client.get("/v1/models", headers=KEY)
        await client.get("/v1/%0Aforged", headers=KEY)
        await client.get("/health")
        figures = (await client.get("/metrics")).text
    assert 'steer_rejects_total{code="invalid_api_key"} 1.0' in figures
    lines = [record.getMessage() for record in caplog.records if record.name == "steer.access"]
    assert len(lines) == 3, "probes that succeed are not logged"
    assert "GET /v1/models 401 invalid_api_key" in lines[0]
    assert "GET /v1/models 200 " in lines[1]
    assert "GET /v1/%0Aforged 404 not_found" in lines[2]
    assert "private" not in caplog.text


async def test_the_access_log_can_be_left_out(
    serve: Callable[..., httpx.AsyncClient], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "steer.access")
    async with serve(access_log=False) as client:
        await client.get("/v1/models")
    assert not caplog.records


@pytest.mark.parametrize("path", ["/health", "/metrics"])
async def test_probes_may_ask_for_the_head_alone(
    serve: Callable[..., httpx.AsyncClient], path: str
) -> None:
    async with serve() as client:
        assert (await client.head(path)).status_code == 200


@pytest.mark.parametrize("engine", ["transformers", "vllm"])
@pytest.mark.parametrize(
    ("given", "open_to_all"),
    [
        ({"host": "0.0.0.0"}, True),
        ({"host": "::"}, True),
        ({"host": "192.168.1.7"}, True),
        ({"host": "steer.example"}, True),
        ({"host": "0.0.0.0", "insecure": True}, False),
        ({"host": "0.0.0.0", "api_key": SecretStr("secret")}, False),
        ({"host": "127.0.0.2"}, False),
        ({"host": "::1"}, False),
        ({"host": "localhost"}, False),
    ],
)
def test_other_machines_are_not_served_without_a_word(
    engine: str, given: dict[str, Any], open_to_all: bool
) -> None:
    settings = ServerSettings(engine=engine, **given)
    if not open_to_all:
        refuse_open_door(settings, {})
        return
    with pytest.raises(SteerError, match="--api-key-file") as refused:
        refuse_open_door(settings, {})
    assert refused.value.code == "no_key"


def test_the_key_that_vllm_is_given_counts() -> None:
    refuse_open_door(ServerSettings(engine="vllm", host="0.0.0.0"), {"VLLM_API_KEY": "secret"})
    assert keys_of(Namespace(api_key=["a", "b"]), {"VLLM_API_KEY": "c"}) == ("a", "b")
    assert keys_of(Namespace(api_key=None), {"VLLM_API_KEY": "c"}) == ("c",)
    assert keys_of(Namespace(api_key=None), {}) == ()


@pytest.fixture
def vllms(in_process: Connect) -> Callable[..., httpx.AsyncClient]:
    """A server with vLLM's routes by name, and Steer's doors."""

    def serve(*keys: str) -> httpx.AsyncClient:
        app = FastAPI()

        @app.api_route("/{path:path}", methods=["GET", "POST"])
        async def any_route(path: str) -> PlainTextResponse:
            return PlainTextResponse(path)

        add_doors(app)
        app.state.steer_keys = keys
        app.state.steer = SimpleNamespace(
            settings=ServerSettings(), metrics=SimpleNamespace(rejects=_Uncounted())
        )
        return in_process(app)

    return serve


class _Uncounted:
    def labels(self, **_: str) -> _Uncounted:
        return self

    def inc(self) -> None:
        pass


async def test_what_runs_or_changes_something_on_vllms_server_needs_its_key(
    vllms: Callable[..., httpx.AsyncClient],
) -> None:
    async with vllms("secret", "other") as client:
        for path in ("/invocations", "/invocations/", "/generate", "/tokenize", "/v1/completions"):
            assert (await client.post(path)).status_code == 401, path
            assert (await client.post(path, headers=KEY)).status_code == 200, path
        assert (await client.post("/ping")).status_code == 200
        assert (await client.get("/health")).status_code == 200
    async with vllms() as client:
        assert (await client.post("/invocations")).status_code == 200


async def test_without_a_key_vllms_server_guards_steers_routes(
    vllms: Callable[..., httpx.AsyncClient],
) -> None:
    page = {"origin": "https://evil.example"}
    async with vllms() as client:
        assert (await client.post(VECTORS, headers=page)).status_code == 403
        assert (await client.post("/v1/inspect/activations", headers=page)).status_code == 403
        assert (await client.post(VECTORS)).status_code == 200
        # What is vLLM's own keeps its own rule.
        assert (await client.post("/v1/completions", headers=page)).status_code == 200
    async with vllms("secret") as client:
        assert (await client.post(VECTORS, headers={**page, **KEY})).status_code == 200
