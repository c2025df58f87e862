"""Fits that take their states from a capture job: the same results, without the model."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest
import torch
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS

from steer.engines.fake.engine import FakeEngine
from steer.fit.requests.saes.training import SAETrainingRequest
from steer.fit.requests.table import FIT_REQUESTS
from steer.jobs import JobRunner
from steer.registry.registry import Registry

TEXTS = [
    {"text": f"{word} day {n}", "label": label}
    for n in range(20)
    for word, label in (("a happy", "true"), ("such a sad", "false"))
]
PROMPTS = [one["text"] for one in TEXTS]
PAIRS = [{"positive": f"a happy day {n}", "negative": f"such a sad day {n}"} for n in range(20)]
CAPTURE = {"prompts": PROMPTS, "layers": [1, 2]}
BODIES: dict[str, dict[str, Any]] = {
    "fit": {"pairs": PAIRS, "choose": "separation", "layers": [1, 2]},
    "fit/labels": {"texts": TEXTS, "layers": [1, 2]},
    "fit/detector": {"texts": TEXTS, "layers": [1, 2], "rate": 0.3},
    "fit/act": {"pairs": PAIRS, "layers": [1]},
    "fit/concepts": {
        "examples": [{"text": one["text"], "pairs": {"mood": one["label"]}} for one in TEXTS],
        "position": "day",
        "dimensions": 256,
        "layers": [1, 2],
    },
    "sae/train": {
        "prompts": PROMPTS,
        "layer": 2,
        "latents": 8,
        "k": 2,
        "rows": 64,
        "held_out": 0.3,
    },
}


@pytest.fixture
def jobs(app: FastAPI) -> JobRunner:
    found: JobRunner = app.state.steer.jobs
    return found


@pytest.fixture
async def running(jobs: JobRunner, http: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    jobs.start()
    yield http
    await asyncio.to_thread(jobs.stop, LIVENESS_SECONDS)


async def worked(http: httpx.AsyncClient, kind: str, body: dict[str, Any]) -> dict[str, Any]:
    asked = await http.post(f"/v1/steering/{kind}", json=body)
    assert asked.status_code == 202, asked.text
    place = asked.headers["location"]
    await http.get(f"{place}/events")
    found: dict[str, Any] = (await http.get(place)).json()
    assert found["state"] == "succeeded", found["error"]
    return found


@pytest.mark.parametrize("kind", BODIES)
async def test_the_result_is_that_of_the_model_which_does_not_run(
    running: httpx.AsyncClient,
    registry: Registry,
    engine: FakeEngine,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    body = {**BODIES[kind], "name": "theirs"}
    theirs = await worked(running, kind, body)
    capture = await worked(running, "capture", CAPTURE)
    with monkeypatch.context() as patched:
        patched.setattr(engine, "capture", None)
        mine = await worked(
            running, kind, {**body, "name": "mine", "states": {"job": capture["id"]}}
        )
    assert mine["request"]["states"] == {"job": capture["id"]}
    for one, other in zip(_made(mine), _made(theirs), strict=True):
        assert _tensors(registry, one) == pytest.approx(_tensors(registry, other), abs=1e-5)


def _made(job: dict[str, Any]) -> list[dict[str, Any]]:
    result = job["result"]
    return list(result["artefacts"]) if "artefacts" in result else [result]


def _tensors(registry: Registry, made: dict[str, Any]) -> list[float]:
    """A few numbers of the artefact."""
    if "vector" in made:
        vector = registry.vector(made["vector"])
        return torch.cat([vector[layer] for layer in vector.card.layers]).tolist()
    if "sae" in made:
        sae = registry.sae(made["sae"])
        found: list[float] = sae.encode(torch.linspace(-1, 1, 16)[None])[0].tolist()
        return found
    if "detector" in made:
        detector = registry.detector(made["detector"])
        return [detector.threshold]
    return list(made["layers"])


async def test_layers_that_are_not_named_are_those_that_are_kept(
    running: httpx.AsyncClient,
) -> None:
    capture = await worked(running, "capture", CAPTURE)
    body = {"texts": TEXTS, "name": "mood", "states": {"job": capture["id"]}}
    found = await worked(running, "fit/labels", body)
    assert all(one["layers"] == [1, 2] for one in found["result"]["artefacts"])


@pytest.mark.parametrize(
    ("kind", "change", "param", "code"),
    [
        ("fit/labels", {"states": {"job": "job-x"}}, "/states/job", "unknown_job"),
        ("fit/labels", {"states": {"job": "OTHER"}}, "/states/job", "not_a_capture"),
        ("fit/labels", {"states": {"job": "POOLED"}}, "/states/job", "states_not_kept"),
        ("fit/labels", {"states": {"job": ""}}, "/states/job", "invalid_value"),
        ("fit/labels", {"states": {}}, "/states/job", "missing_field"),
        ("fit/labels", {"layers": [1, 3]}, "/layers/1", "states_not_kept"),
        ("fit/detector", {"layers": [0]}, "/layers/0", "states_not_kept"),
        ("fit", {"choose": "effect"}, "/choose", "no_model"),
        ("sae/train", {"layer": 3}, "/layer", "states_not_kept"),
        ("sae/train", {"answer_tokens": 2}, "/answer_tokens", "no_model"),
    ],
)
async def test_what_cannot_be_read_is_told_before_the_job_is_queued(
    running: httpx.AsyncClient, kind: str, change: dict[str, Any], param: str, code: str
) -> None:
    capture = await worked(running, "capture", CAPTURE)
    pooled = await worked(running, "capture", {**CAPTURE, "pooled": "mean"})
    other = await worked(running, "fit/labels", {**BODIES["fit/labels"], "name": "other"})
    body = {**BODIES[kind], "name": "mine", "states": {"job": capture["id"]}, **change}
    names = {"OTHER": other["id"], "POOLED": pooled["id"]}
    if body["states"]:
        body["states"] = {"job": names.get(body["states"]["job"], body["states"]["job"])}
    answer = await running.post(f"/v1/steering/{kind}", json=body)
    assert 400 <= answer.status_code < 500
    error = answer.json()["error"]
    assert (error["param"], error["code"]) == (param, code), error
    assert len((await running.get("/v1/jobs")).json()["data"]) == 3


async def test_a_capture_that_has_not_finished_or_lies_elsewhere(
    http: httpx.AsyncClient, jobs: JobRunner, registry: Registry
) -> None:
    capture = (await http.post("/v1/steering/capture", json=CAPTURE)).json()["id"]
    body = {**BODIES["fit/labels"], "name": "mine", "states": {"job": capture}}
    early = await http.post("/v1/steering/fit/labels", json=body)
    assert (early.status_code, early.json()["error"]["code"]) == (409, "job_not_finished")
    jobs.start()
    await http.get(f"/v1/jobs/{capture}/events")
    registry.job_outputs.remove(capture)
    gone = await http.post("/v1/steering/fit/labels", json=body)
    assert gone.json()["error"]["code"] == "no_capture"
    assert gone.json()["error"]["param"] == "/states/job"
    await asyncio.to_thread(jobs.stop, LIVENESS_SECONDS)


async def test_a_text_that_was_not_captured_fails_the_job(running: httpx.AsyncClient) -> None:
    capture = await worked(running, "capture", {**CAPTURE, "prompts": PROMPTS[:-1]})
    body = {**BODIES["fit/labels"], "name": "mine", "states": {"job": capture["id"]}}
    asked = await running.post("/v1/steering/fit/labels", json=body)
    await running.get(f"{asked.headers['location']}/events")
    job = (await running.get(asked.headers["location"])).json()
    assert (job["state"], job["error"]["code"]) == ("failed", "states_not_kept")


async def test_files_are_held_while_a_job_is_to_read_them(
    http: httpx.AsyncClient, registry: Registry, jobs: JobRunner
) -> None:
    draft = registry.jobs
    asked = (await http.post("/v1/steering/capture", json=CAPTURE)).json()["id"]
    claim = draft.claim(
        "me", kinds=["capture"], model=jobs._model, place=registry.job_files.place, lease=60
    )
    assert claim is not None
    result = jobs._result(_run(claim), jobs.kinds["capture"])
    draft.finish(claim, "succeeded", result=result)
    # Nobody runs jobs here: this one stays queued.
    body = {**BODIES["fit/labels"], "name": "mine", "states": {"job": asked}}
    reader = (await http.post("/v1/steering/fit/labels", json=body)).json()["id"]
    refused = await http.delete(f"/v1/jobs/{asked}")
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_in_use")
    assert reader in refused.json()["error"]["message"]
    draft.prune(0)
    assert registry.job_outputs.folder(asked).is_dir()
    assert draft.get(asked).state == "succeeded"
    await http.post(f"/v1/jobs/{reader}/cancel")
    assert (await http.delete(f"/v1/jobs/{asked}")).status_code == 200
    assert not registry.job_outputs.folder(asked).exists()


def _run(claim: Any) -> Any:
    from steer.jobs.runner import _Run

    return _Run(claim)


def test_every_fit_that_reads_states_alone_can_take_them() -> None:
    """As on the command line: with data, and without gradients."""
    for request in FIT_REQUESTS:
        able = request.form is not None and not request.needs_gradients
        assert ("states" in request.model_fields) == able, request
    assert "states" in SAETrainingRequest.model_fields
