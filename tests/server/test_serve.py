"""From settings to a server."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from anyio import to_thread
from counting_jobs import finished
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS
from pydantic import ValidationError
from rich.console import Console

from steer.artefacts.control_vector import ControlVector
from steer.cli.local import quiet
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.errors import Unsupported
from steer.registry.registry import Registry
from steer.spec import Where
from steer_server.app import create_app
from steer_server.banner import banner, example
from steer_server.serve import build, load_engine, log_requests
from steer_server.settings import ServerSettings


def test_the_settings_say_what_is_served(tmp_path: Path) -> None:
    settings = ServerSettings(engine="fake", model="some-model", registry=str(tmp_path / "r"))
    app = build(settings)
    assert isinstance(app.state.steer.engine, FakeEngine)
    assert app.state.steer.model_name == "some-model"
    app.state.steer.registry.close()


def test_an_unknown_engine_is_refused_by_name() -> None:
    with pytest.raises(Unsupported, match=r"'abacus'.*transformers"):
        load_engine(ServerSettings(engine="abacus"))
    with pytest.raises(ValidationError):
        ServerSettings(max_uploads=5)  # type: ignore[call-arg]


def test_the_banner_says_where_what_and_how(app: FastAPI) -> None:
    out = io.StringIO()
    serving = app.state.steer
    Console(file=out, width=300).print(banner(serving, "http://127.0.0.1:8000"))
    own = "this machine, without a key"
    for part in ("http://127.0.0.1:8000/v1", "fake-model", "calm, deep, joy, wide", own):
        assert part in out.getvalue()
    assert '\'{"model": "fake-model"' in example(serving, "http://x")


def test_requests_are_logged_though_the_command_line_is_quiet() -> None:
    own = logging.getLogger("steer")
    before = own.level
    try:
        quiet()
        assert not logging.getLogger("steer.access").isEnabledFor(logging.INFO)
        log_requests()
        assert logging.getLogger("steer.access").isEnabledFor(logging.INFO)
    finally:
        own.setLevel(before)


def add(registry: Registry, name: str, widths: dict[int, int], **card: Any) -> None:
    registry.add(
        name, ControlVector.of({n: torch.ones(width) for n, width in widths.items()}, **card)
    )


def suggestion(registry: Registry, settings: ServerSettings) -> str:
    return example(create_app(FakeEngine(), registry, settings).state.steer, "http://x")


def test_the_banner_suggests_what_steers_this_model(
    tmp_path: Path, settings: ServerSettings
) -> None:
    with Registry.open(tmp_path / "shared") as registry:
        add(registry, "a-of-another", {2: 16}, model="another")
        add(registry, "b-wide", {2: 17})
        add(registry, "c-deep", {2: 16, 9: 16})
        add(registry, "d-nothing", {2: 16}, default_strength=0.0)
        never = Where(phases=("prompt",), positions=((900, 901),))
        add(registry, "e-never", {2: 16}, default_where=never)
        add(registry, "f-elsewhere", {2: 16}, site="mlp_act")
        told = suggestion(registry, settings)
        assert "/v1/steering/vectors" in told
        assert "-F file=@" in told
        assert not any(entry.name in told for entry in registry.entries("vector"))
        add(registry, "g-of-nobody", {2: 16})
        assert '"vector": "g-of-nobody"' in suggestion(registry, settings)
        add(registry, "h-ours", {2: 16}, model="org/fake-model")
        assert '"vector": "h-ours"' in suggestion(registry, settings)


async def test_the_suggested_request_works_and_steers(
    app: FastAPI, http: httpx.AsyncClient
) -> None:
    command = example(app.state.steer, "http://steer")
    body = command.partition("-d '")[2].removesuffix("'")
    answer = await http.post("/v1/chat/completions", json=json.loads(body))
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["tokens_steered"] > 0


async def test_no_answer_says_where_the_model_lies(
    tmp_path: Path, settings: ServerSettings, in_process: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    folder = tmp_path / "secret-place" / "tiny"
    folder.mkdir(parents=True)
    for served, name in ((None, "tiny"), ("prod", "prod")):
        with Registry.open(tmp_path / "r") as registry:
            add(registry, "old", {2: 16}, model=str(folder), provenance={"model": str(folder)})
            mine = settings.model_copy(update={"served_name": served})
            app = create_app(FakeEngine(fake_model(name=str(folder))), registry, mine)
            async with in_process(app) as http:
                answers = await _everything(http, name)
                for route, answer in answers.items():
                    assert "secret-place" not in answer.text, (route, answer.text)
                listed = (await http.get("/v1/models")).json()["data"][0]["id"]
                model = answers["/v1/steering/capabilities"].json()["model"]
                assert listed == name == model["id"] == model["name"]
                for route in ("logit-lens", "activations", "patchscope"):
                    assert answers[route].json().get("model") == name, answers[route].text
                assert answers["refused"].json()["error"]["code"] == "wrong_width"
                job = await _fitted(http, app)
                assert "secret-place" not in json.dumps(job)
                assert registry.entry("vector", "fresh").card.model == "tiny"
                assert registry.vector("fresh").card.provenance["model"] == "tiny"


async def _everything(http: httpx.AsyncClient, name: str) -> dict[str, httpx.Response]:
    gets = ["/health", "/v1/models", "/v1/steering/capabilities", "/metrics"]
    gets += ["/v1/steering/vectors", "/v1/steering/vectors/old", "/v1/models/nobody"]
    found = {route: await http.get(route) for route in gets}
    wide = {"file": ("w.safetensors", ControlVector.of({2: torch.ones(17)}).to_bytes())}
    found["refused"] = await http.post("/v1/steering/vectors", files=wide)
    prompt = {"messages": [{"role": "user", "content": "Hi"}]}
    found["logit-lens"] = await http.post("/v1/inspect/logit-lens", json=prompt)
    found["activations"] = await http.post("/v1/inspect/activations", json=prompt)
    found["patchscope"] = await http.post(
        "/v1/inspect/patchscope", json={"source": prompt, "positions": [-1], "max_tokens": 2}
    )
    chat = {"model": name, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
    spec = {"interventions": [{"kind": "add", "vector": "old"}]}
    found["chat"] = await http.post("/v1/chat/completions", json={**chat, "steering": spec})
    assert found["chat"].json()["steering"]["tokens_steered"] > 0
    far = {"interventions": [{"kind": "add", "vector": "old", "layers": [99]}]}
    found["error"] = await http.post("/v1/chat/completions", json={**chat, "steering": far})
    return found


async def _fitted(http: httpx.AsyncClient, app: FastAPI) -> dict[str, Any]:
    """The finished job that fits `fresh`."""
    pairs = [{"positive": f"a happy day {n}", "negative": f"a sad day {n}"} for n in range(12)]
    body = {"name": "fresh", "pairs": pairs, "layers": [1, 2]}
    asked = await http.post("/v1/steering/fit", json=body)
    assert asked.status_code == 202, asked.text
    runner = app.state.steer.jobs
    await to_thread.run_sync(runner.start)
    try:
        await to_thread.run_sync(finished, runner, asked.json()["id"])
    finally:
        await to_thread.run_sync(runner.stop)
    job: dict[str, Any] = (await http.get(f"/v1/jobs/{asked.json()['id']}")).json()
    assert job["state"] == "succeeded", job
    return job


def test_the_engine_lives_as_long_as_the_server(live: str, engine: FakeEngine) -> None:
    assert httpx.get(f"{live}/health", timeout=LIVENESS_SECONDS).json()["status"] == "ok"
    assert engine.running
