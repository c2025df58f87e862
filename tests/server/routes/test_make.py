"""A vector from a sentence, as a job and as a command."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from liveness import LIVENESS_SECONDS
from steer_vectors import LIBRARY
from tiny_models import byte_model
from typer.testing import CliRunner

from steer.artefacts.control_vector import ControlVector
from steer.cli import app as command_line
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

BODY: dict[str, Any] = {
    "instruction": "be loud!",
    "opposite": "be quiet",
    "name": "loud",
    "prompts": [f"{word} {n}" for n in range(8) for word in ("how", "why", "who")],
    "nulls": 1,
    "max_tokens": 6,
    "seed": 1,
}


@pytest.fixture(scope="module")
def lively() -> Iterator[TransformersEngine]:
    model = byte_model(initializer_range=0.2)
    with TransformersEngine(model, ByteTokenizer(), name="lively") as running:
        yield running


@pytest.fixture
async def running(
    lively: TransformersEngine, registry: Registry, settings: ServerSettings
) -> AsyncIterator[httpx.AsyncClient]:
    app = create_app(lively, registry, settings)
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    app.state.steer.jobs.start()
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await asyncio.to_thread(app.state.steer.jobs.stop, LIVENESS_SECONDS)


async def test_a_job_makes_and_registers_it(running: httpx.AsyncClient, registry: Registry) -> None:
    response = await running.post("/v1/steering/make", json=BODY)
    assert response.status_code == 202, response.text
    job = response.json()
    assert (await running.get(f"/v1/jobs/{job['id']}/events")).is_success
    job = (await running.get(f"/v1/jobs/{job['id']}")).json()

    assert job["state"] == "succeeded", job
    assert job["request"]["prompts"] == len(BODY["prompts"])
    assert job["progress"]["done"] == job["progress"]["total"] > 0
    result = job["result"]
    assert registry.entry("vector", "loud").sha256 == result["sha256"]
    assert [row["name"] for row in result["check"]["rows"]] == ["unsteered", "in words", "steered"]
    assert result["works"] in (True, False)
    card = registry.vector("loud").card
    assert list(card.default_layers or ()) == result["chosen"]["use"]["layers"]


@pytest.mark.parametrize(
    ("change", "code", "param"),
    [
        ({"instruction": " "}, "invalid_value", "instruction"),
        ({"prompts": ["one"]}, "invalid_value", "prompts"),
        ({"site": "attn_gone"}, "invalid_value", "site"),
        ({"score": "python:os:system"}, "scorer_refused", "score"),
        ({"place": "nowhere"}, "invalid_value", "place"),
        ({"layer": 3}, "unknown_field", "layer"),
    ],
)
async def test_what_cannot_be_made_is_refused_at_once(
    running: httpx.AsyncClient, change: dict[str, Any], code: str, param: str
) -> None:
    response = await running.post("/v1/steering/make", json={**BODY, **change})

    error = response.json()["error"]
    assert (response.status_code, error["code"]) == (400, code), response.text
    assert error["param"].strip("/").split("/")[0] == param


def test_a_command_makes_it_on_the_demo_model(tmp_path: Path) -> None:
    asked = (LIBRARY / "demo" / "data" / "heldout.jsonl").read_text("utf-8").splitlines()[:42]
    (tmp_path / "asked.jsonl").write_text("\n".join(asked) + "\n", "utf-8")
    file = tmp_path / "fr.safetensors"
    arguments = ["make", "Answer in French.", "--name", "fr", "--opposite", "Answer in English."]
    options = ["--prompts", tmp_path / "asked.jsonl", "--nulls", 1, "--max-tokens", 12]

    shown = CliRunner().invoke(
        command_line,
        [*arguments, *map(str, options), "-o", str(file), "--report", str(tmp_path / "report")],
    )

    assert shown.exit_code == 0, shown.output
    vector = ControlVector.from_bytes(file.read_bytes(), name="fr")
    assert vector.card.provenance["chosen_by"] == "effect"
    report = json.loads((tmp_path / "report" / "report.json").read_text("utf-8"))
    unsteered, told, steered = (row["score"]["value"] for row in report["check"]["rows"])
    assert unsteered < 0.3 < min(told, steered)
    assert "in words" in shown.output
    assert (tmp_path / "report" / "made.png").is_file()
