"""A job obeys what the server allows of specs, as a chat does."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import httpx
import pytest
import torch
from artefacts import calibration
from fastapi import FastAPI

from steer.artefacts.control_vector import ControlVector
from steer.engines.fake.engine import FakeEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

EVALUATE = {
    "prompts": ["How are you?"],
    "score": "words:joy",
    "instruction": "Be merry.",
    "max_tokens": 4,
}
SENT = b64encode(ControlVector.of({2: torch.ones(16)}).to_bytes()).decode()
INLINE = {"interventions": [{"kind": "add", "vector": {"data": SENT}, "strength": 1.0}]}
BEYOND = {"interventions": [{"kind": "add", "vector": "joy", "strength": 3.0}]}


@pytest.fixture
def calibrated(registry: Registry) -> None:
    """The vector has a calibrated range of 0 to 2."""
    plain = registry.vector("joy")
    card = plain.card.model_copy(
        update={"calibration": calibration(model="fake-model", layers=plain.card.used_layers)}
    )
    registry.add("joy", replace(plain, card=card))


Connect = Callable[[FastAPI], httpx.AsyncClient]


def server(
    engine: FakeEngine, registry: Registry, settings: ServerSettings, **changed: Any
) -> FastAPI:
    return create_app(engine, registry, settings.model_copy(update=changed))


def evaluation(steering: dict[str, Any]) -> dict[str, Any]:
    return {**EVALUATE, "methods": [{"name": "one", "steering": steering}]}


async def test_vectors_inside_specs_are_refused_where_chats_refuse_them(
    engine: FakeEngine,
    registry: Registry,
    settings: ServerSettings,
    in_process: Connect,
    chat: Any,
) -> None:
    app = server(engine, registry, settings, allow_inline_vectors=False)
    async with in_process(app) as client:
        said = await client.post("/v1/chat/completions", json=chat(steering=INLINE))
        asked = await client.post("/v1/steering/evaluate", json=evaluation(INLINE))
    assert said.json()["error"]["code"] == "inline_vectors_disabled"
    error = asked.json()["error"]
    assert asked.status_code == said.status_code
    assert error["code"] == "inline_vectors_disabled"
    assert error["param"] == "/methods/0/steering/interventions/0/vector"


async def test_vectors_inside_specs_are_taken_where_chats_take_them(
    http: httpx.AsyncClient,
) -> None:
    asked = await http.post("/v1/steering/evaluate", json=evaluation(INLINE))
    assert asked.status_code == 202, asked.text


async def test_a_saved_profile_is_no_way_around(
    engine: FakeEngine, registry: Registry, settings: ServerSettings, in_process: Connect
) -> None:
    async with in_process(server(engine, registry, settings)) as client:
        saved = {"name": "mine", "spec": INLINE}
        assert (await client.post("/v1/steering/profiles", json=saved)).is_success
    body = {**EVALUATE, "methods": [{"name": "one", "profile": "mine"}]}
    app = server(engine, registry, settings, allow_inline_vectors=False)
    async with in_process(app) as client:
        error = (await client.post("/v1/steering/evaluate", json=body)).json()["error"]
    assert (error["code"], error["param"]) == ("inline_vectors_disabled", "/methods/0/profile")


@pytest.mark.usefixtures("calibrated")
@pytest.mark.parametrize("limit", ["off", "refuse", "cap"])
async def test_strengths_are_held_to_the_calibrated_range(
    engine: FakeEngine,
    registry: Registry,
    settings: ServerSettings,
    in_process: Connect,
    limit: Literal["off", "refuse", "cap"],
) -> None:
    """A sweep reports strengths as they were asked for, so none of them is capped silently."""
    sweep = {"vector": "joy", "prompts": ["Hi"], "score": "words:joy", "strengths": [1, 3]}
    async with in_process(server(engine, registry, settings, strength_limit=limit)) as client:
        compared = await client.post("/v1/steering/evaluate", json=evaluation(BEYOND))
        swept = await client.post("/v1/steering/sweep", json=sweep)
        inside = await client.post("/v1/steering/sweep", json={**sweep, "strengths": [1, 2]})
    assert compared.status_code == (400 if limit == "refuse" else 202)
    assert swept.status_code == (202 if limit == "off" else 400)
    assert inside.status_code == 202
    if limit == "refuse":
        error = compared.json()["error"]
        at = "/methods/0/steering/interventions/0/strength"
        assert (error["code"], error["param"]) == ("outside_calibration", at)
    if limit != "off":
        error = swept.json()["error"]
        assert (error["code"], error["param"]) == ("outside_calibration", "/strengths")
