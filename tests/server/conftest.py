"""A server over the fake engine: in process, and on a real port for OpenAI's own client."""

from __future__ import annotations

import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.fake.controls import Stepper
from steer.engines.fake.engine import FakeEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.serve import Server
from steer_server.settings import ServerSettings

WIDTH = 16
LIMIT = 200_000


def vector(seed: int, *layers: int, width: int = WIDTH, **card: Any) -> ControlVector:
    generator = torch.Generator().manual_seed(seed)
    rows = {layer: torch.randn(width, generator=generator) for layer in layers}
    return ControlVector.of(rows, **card)


def small_sae() -> SAE:
    generator = torch.Generator().manual_seed(3)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    return SAE.of(
        "relu",
        W_enc=random(WIDTH, 8),
        b_enc=random(8),
        W_dec=random(8, WIDTH),
        b_dec=random(WIDTH),
        layer=2,
        labels={
            1: FeatureLabel(text="French words", auroc=0.9),
            5: FeatureLabel(text="French cities", auroc=0.99),
            6: FeatureLabel(text="food"),
        },
    )


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry", max_upload_bytes=LIMIT) as opened:
        opened.add("joy", vector(1, 2, 3))
        opened.add("calm", vector(2, 3))
        opened.add("wide", vector(3, 2, width=WIDTH + 1))
        opened.add("deep", vector(4, 99))
        opened.add("features", small_sae())
        yield opened


@pytest.fixture
def settings() -> ServerSettings:
    return ServerSettings(
        port=0, max_upload_bytes=LIMIT, max_body_bytes=2 * LIMIT, drain_seconds=1, measured_share=0
    )


@pytest.fixture
def engine() -> FakeEngine:
    return FakeEngine()


@pytest.fixture
def app(engine: FakeEngine, registry: Registry, settings: ServerSettings) -> FastAPI:
    return create_app(engine, registry, settings)


@pytest.fixture
def in_process() -> Callable[[FastAPI], httpx.AsyncClient]:
    """Makes a client that calls the application directly."""

    def connect(app: FastAPI) -> httpx.AsyncClient:
        transport = httpx.ASGITransport(app, raise_app_exceptions=False)
        return httpx.AsyncClient(transport=transport, base_url="http://localhost")

    return connect


@pytest.fixture
async def http(
    app: FastAPI, in_process: Callable[[FastAPI], httpx.AsyncClient]
) -> AsyncIterator[httpx.AsyncClient]:
    async with in_process(app) as client:
        yield client


@pytest.fixture
def live(app: FastAPI, settings: ServerSettings, engine: FakeEngine) -> Iterator[str]:
    """The URL of the application on a loopback port of its own."""
    listening = threading.Event()

    class Announced(Server):
        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            listening.set()

    server = Announced(app, settings)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    assert listening.wait(LIVENESS_SECONDS)
    yield server.url
    server.should_exit = True
    if engine.stepper is not None:
        engine.stepper.allow(10_000)
    thread.join(LIVENESS_SECONDS)
    assert not thread.is_alive()


@pytest.fixture
def client(live: str) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{live}/v1", api_key="none", max_retries=0) as connected:
        yield connected


@pytest.fixture
def stepper(engine: FakeEngine) -> Stepper:
    """Holds the engine back until the test lets tokens through."""
    engine.stepper = Stepper()
    return engine.stepper


@pytest.fixture
def chat() -> Callable[..., dict[str, Any]]:
    """Makes the body of a greedy chat; keywords are its other fields."""

    def body(**fields: Any) -> dict[str, Any]:
        return {
            "model": "fake-model",
            "messages": [{"role": "user", "content": "How are you?"}],
            "temperature": 0,
            **fields,
        }

    return body


@pytest.fixture
def joy() -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": "joy", "strength": 2.0}]}


@pytest.fixture
def sse() -> Callable[[str], list[dict[str, Any]]]:
    """The chunks of a stream; checks that it ends as it must."""

    def parsed(text: str) -> list[dict[str, Any]]:
        events = text.split("\n\n")
        assert events[-2:] == ["data: [DONE]", ""]
        return [json.loads(event.removeprefix("data: ")) for event in events[:-2]]

    return parsed
