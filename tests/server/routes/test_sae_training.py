"""SAEs trained in a job, over HTTP, and by the command line."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS
from typer.testing import CliRunner

from steer.artefacts.sae import load_directory
from steer.cli.app import app as cli
from steer.registry.registry import Registry

TEXTS = [f"{word} number {n}, and some more of it" for n in range(20) for word in ("fish", "bird")]
BODY: dict[str, Any] = {
    "name": "trained",
    "prompts": TEXTS,
    "layer": 1,
    "latents": 24,
    "k": 3,
    "rows": 64,
    "epochs": 4.0,
    "held_out": 0.2,
}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(autouse=True)
def _jobs_run(app: FastAPI) -> Iterator[None]:
    app.state.steer.jobs.start()
    yield
    app.state.steer.jobs.stop(LIVENESS_SECONDS)


async def worked(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    """The job that was asked for, when it has ended."""
    asked = await http.post("/v1/steering/sae/train", json=body)
    assert asked.status_code == 202, asked.text
    place = asked.headers["location"]
    await http.get(f"{place}/events")
    return (await http.get(place)).json()


async def test_a_trained_sae_is_registered_and_clamped(
    http: httpx.AsyncClient, registry: Registry, cache: Path
) -> None:
    job = await worked(http, BODY)
    assert job["state"] == "succeeded", job
    assert job["request"]["prompts"] == len(TEXTS)
    found = job["result"]
    assert found["sae"].startswith("trained@")
    assert 0 < found["measures"]["active"] <= 3
    assert found["loss"] is None  # this engine has no derivatives
    sae = await asyncio.to_thread(registry.sae, "trained")
    assert (sae.d_sae, sae.k, sae.layer) == (24, 3, 1)
    assert not list((cache / "training").glob("*"))  # nothing is left of the work
    chat = {
        "model": "fake",
        "messages": [{"role": "user", "content": "hello"}],
        "max_tokens": 3,
        "steering": {
            "interventions": [{"kind": "clamp", "sae": "trained", "features": [0, 5], "value": 9.0}]
        },
    }
    models = (await http.get("/v1/models")).json()
    chat["model"] = models["data"][0]["id"]
    answer = await http.post("/v1/chat/completions", json=chat)
    assert answer.status_code == 200, answer.text
    assert answer.json()["steering"]["tokens_steered"] > 0


@pytest.mark.parametrize("kind", [bool, int, float])
async def test_labels_become_the_first_features(
    http: httpx.AsyncClient, registry: Registry, kind: type
) -> None:
    labels = {
        name: [None if n % 5 == 0 else kind(name in text) for n, text in enumerate(TEXTS)]
        for name in ("fish", "bird")
    }
    job = await worked(http, {**BODY, "labels": labels})
    assert job["state"] == "succeeded", job
    assert job["request"]["labels"] == ["bird", "fish"]
    sae = await asyncio.to_thread(registry.sae, "trained")
    assert {n: one.text for n, one in sae.labels.items()} == {0: "bird", 1: "fish"}


@pytest.mark.parametrize(
    ("change", "param", "said"),
    [
        ({"layer": 99}, "/layer", "99"),
        ({"k": 25}, "/k", "25 of 24 latents cannot be active"),
        ({"labels": {"a/b": [True]}}, "/labels/a~1b", "given for 1 of 40 texts"),
        ({"labels": {"a": [2] * 40}}, "/labels/a/0", "true or false is needed"),
        (
            {"labels": {"a": [True] * 40}, "architecture": "matching_pursuit"},
            "/architecture",
            "matching pursuit has none",
        ),
        ({"labels": {str(n): [True] * 40 for n in range(40)}}, "/latents", "there are 40 labels"),
        ({"prediction_weight": 1.0}, None, "cannot differentiate"),
        ({"prompts": TEXTS[:3]}, "/prompts", "at least 16"),
        ({"architecture": "gated"}, "/architecture", "batchtopk"),
    ],
)
async def test_what_cannot_be_trained_is_refused_at_its_field(
    http: httpx.AsyncClient, change: dict[str, Any], param: str | None, said: str
) -> None:
    answer = await http.post("/v1/steering/sae/train", json={**BODY, **change})
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"], error
    if param is not None:
        assert error["param"] == param


def test_the_command_writes_a_folder_that_saelens_reads(tmp_path: Path, cache: Path) -> None:
    texts = tmp_path / "texts.jsonl"
    lines = [{"text": f"Where is {n}?", "label": f"l{n % 2}"} for n in range(40)]
    texts.write_text("\n".join(map(json.dumps, lines)))
    command = (
        f"sae train {texts} --labelled --name s --layer 3 --latents 64 --k 4 --rows 64 "
        f"--epochs 3 --held-out 0.3 --out {tmp_path / 'out'} --plot {tmp_path / 'curve.png'}"
    )
    done = CliRunner().invoke(cli, command.split())
    assert done.exit_code == 0, done.output
    assert "of the variance explained" in done.output
    assert "recovered" in done.output
    sae = load_directory(tmp_path / "out")
    assert (sae.d_sae, sae.k, sae.labels[0].text) == (64, 4, "l0")
    assert sae.card.provenance["held_out"]["tokens"] > 64
    assert (tmp_path / "curve.png").exists()
    assert not list((cache / "training").glob("*"))
