"""Calibrated strengths over HTTP: what the answer says they became, and the server's limit."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import httpx
import pytest
from artefacts import calibration
from fastapi import FastAPI

from steer.engines.fake.engine import FakeEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings
from steer_server.vllm.settings import settings_of


@pytest.fixture
def calibrated(registry: Registry) -> str:
    """A vector with a calibrated range of 0 to 2, KL 0 to .4."""
    plain = registry.vector("joy")
    card = plain.card.model_copy(
        update={"calibration": calibration(model="fake-model", layers=plain.card.used_layers)}
    )
    registry.add("joy", replace(plain, card=card))
    return "joy"


def steering(strength: Any) -> dict[str, Any]:
    return {"interventions": [{"kind": "add", "vector": "joy", "strength": strength}]}


def limited(
    engine: FakeEngine,
    registry: Registry,
    settings: ServerSettings,
    limit: Literal["refuse", "cap"],
) -> FastAPI:
    return create_app(engine, registry, settings.model_copy(update={"strength_limit": limit}))


@pytest.mark.usefixtures("calibrated")
async def test_the_answer_says_what_a_strength_became(http: httpx.AsyncClient, chat: Any) -> None:
    asked = steering({"kl": 0.1})
    answer = await http.post("/v1/chat/completions", json=chat(steering=asked))
    wanted = [{"intervention": 0, "requested": {"kl": 0.1}, "strength": 1.0, "capped": False}]
    assert answer.json()["steering"]["strengths"] == wanted
    shown = (await http.post("/v1/steering/validate", json={"steering": asked})).json()
    [entry] = shown["plan"]["interventions"]
    assert (entry["strength"], entry["requested"]) == (1.0, {"kl": 0.1})
    plain = await http.post("/v1/chat/completions", json=chat(steering=steering(1.0)))
    assert "strengths" not in plain.json()["steering"]
    assert plain.json()["steering"]["fingerprint"] == answer.json()["steering"]["fingerprint"]


@pytest.mark.usefixtures("calibrated")
async def test_outside_the_range_is_refused_by_name(http: httpx.AsyncClient, chat: Any) -> None:
    body = chat(steering=steering({"kl": 5}))
    answer = await http.post("/v1/chat/completions", json=body)
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["code"] == "outside_calibration"
    assert error["param"] == "/steering/interventions/0/strength"
    assert "kl can be 0 to 0.4" in error["message"]


@pytest.mark.usefixtures("calibrated")
async def test_a_server_can_cap(
    engine: FakeEngine,
    registry: Registry,
    settings: ServerSettings,
    in_process: Callable[[FastAPI], httpx.AsyncClient],
    chat: Any,
) -> None:
    async with in_process(limited(engine, registry, settings, "cap")) as http:
        answer = await http.post("/v1/chat/completions", json=chat(steering=steering(9)))
    assert answer.json()["steering"]["strengths"] == [
        {"intervention": 0, "requested": 9.0, "strength": 2.0, "capped": True}
    ]
    assert engine.seen[-1].plan is not None
    assert engine.seen[-1].plan.strengths == (2.0,)


@pytest.mark.usefixtures("calibrated")
async def test_a_server_can_refuse(
    engine: FakeEngine,
    registry: Registry,
    settings: ServerSettings,
    in_process: Callable[[FastAPI], httpx.AsyncClient],
    chat: Any,
) -> None:
    async with in_process(limited(engine, registry, settings, "refuse")) as http:
        answer = await http.post("/v1/chat/completions", json=chat(steering=steering(9)))
        inside = await http.post("/v1/chat/completions", json=chat(steering=steering(2)))
    assert answer.json()["error"]["code"] == "outside_calibration"
    assert inside.status_code == 200


def test_the_limit_is_an_environment_variable_on_vllm() -> None:
    found = settings_of({"STEER_STRENGTH_LIMIT": "cap"}, model="m", served_name="m")
    assert found.strength_limit == "cap"
    assert settings_of({}, model="m", served_name="m").strength_limit == "off"
