"""States of a data set kept by a job: fetched, they are what the engine reads."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS
from typer.testing import CliRunner

from steer.cli import app as commands
from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import FakeEngine
from steer.fit.bulk.card import CARD
from steer.fit.bulk.shards import CapturedStates
from steer.jobs import JobRunner
from steer.model import HookPoint
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

TEXTS = ["one text", [{"role": "user", "content": "another?"}], {"tokens": [5, 6, 7]}]
BODY: dict[str, Any] = {"prompts": TEXTS, "layers": [1, 2]}
ADD = {"interventions": [{"kind": "add", "vector": "joy", "layers": [2], "strength": 3.0}]}


@pytest.fixture
async def running(app: FastAPI, http: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    jobs: JobRunner = app.state.steer.jobs
    jobs.start()
    yield http
    await asyncio.to_thread(jobs.stop, LIVENESS_SECONDS)


async def worked(http: httpx.AsyncClient, body: dict[str, Any]) -> dict[str, Any]:
    asked = await http.post("/v1/steering/capture", json=body)
    assert asked.status_code == 202, asked.text
    place = asked.headers["location"]
    await http.get(f"{place}/events")
    return (await http.get(place)).json()


async def fetched(http: httpx.AsyncClient, job_id: str, folder: Path) -> Path:
    folder.mkdir()
    listed = (await http.get(f"/v1/jobs/{job_id}/files")).json()["data"]
    for one in listed:
        answer = await http.get(f"/v1/jobs/{job_id}/files/{one['name']}")
        assert answer.status_code == 200
        assert len(answer.content) == one["bytes"]
        (folder / one["name"]).write_bytes(answer.content)
    return folder


async def test_what_is_fetched_is_what_the_engine_reads(
    running: httpx.AsyncClient, engine: FakeEngine, tmp_path: Path
) -> None:
    job = await worked(running, {**BODY, "where": {"positions": [[-3, None]]}})
    assert job["state"] == "succeeded", job
    assert job["request"]["prompts"] == 3
    assert (job["result"]["texts"], job["result"]["rows"]) == (3, 9)
    folder = await fetched(running, job["id"], tmp_path / "states")
    names = sorted(one.name for one in folder.iterdir())
    assert names == [CARD, "states-00000.safetensors"]
    found = CapturedStates.open(folder, HookPoint(2), verify=True)
    assert found.card.data == job["result"]["data"]
    assert found.tokens[-3:].tolist() == [5, 6, 7]
    [alone] = engine.capture(CaptureRequest([[5, 6, 7]], (HookPoint(2),)))
    torch.testing.assert_close(found.rows(np.arange(6, 9)), alone.states[HookPoint(2)])
    # The same as JSON lines.
    lines = "".join(json.dumps(one) + "\n" for one in TEXTS)
    other = await worked(
        running, {"data": lines, "layers": [1, 2], "where": {"positions": [[-3, None]]}}
    )
    assert other["result"]["data"] == job["result"]["data"]


async def test_parts_of_files_and_files_that_are_not(running: httpx.AsyncClient) -> None:
    job = await worked(running, BODY)
    place = f"/v1/jobs/{job['id']}/files"
    whole = (await running.get(f"{place}/{CARD}")).content
    part = await running.get(f"{place}/{CARD}", headers={"range": "bytes=2-9"})
    assert (part.status_code, part.content) == (206, whole[2:10])
    for name in ("none", "capture.lock", "..%2F..%2Fcatalogue.db", "%2e%2e"):
        missing = await running.get(f"{place}/{name}")
        assert missing.status_code == 404, name
    assert (await running.get("/v1/jobs/job-x/files")).json()["error"]["code"] == "unknown_job"
    other = await running.get("/v1/jobs/job-x/files/capture.json")
    assert other.json()["error"]["code"] == "unknown_job"


async def test_answers_are_read_under_a_spec(running: httpx.AsyncClient, tmp_path: Path) -> None:
    body = {**BODY, "answer_tokens": 3, "temperature": 0.0, "layers": [2]}
    plain = await worked(running, body)
    steered = await worked(running, {**body, "steering": ADD})
    assert steered["state"] == "succeeded", steered
    assert steered["request"]["steering"]["interventions"][0]["vector"] == "joy"
    assert (plain["result"]["steering"], len(steered["result"]["steering"])) == (None, 32)
    rows = []
    for n, job in enumerate((plain, steered)):
        found = CapturedStates.open(await fetched(running, job["id"], tmp_path / str(n)))
        assert found.generated.any()
        rows.append(found.rows(np.flatnonzero(~found.generated)))
    assert float((rows[1] - rows[0]).norm(dim=-1).min()) > 0.5


async def test_files_are_kept_as_long_as_their_job(
    running: httpx.AsyncClient, registry: Registry
) -> None:
    job = await worked(running, BODY)
    folder = registry.job_outputs.folder(job["id"])
    assert folder.is_dir()
    # Whatever else ends, and however the server is started again.
    await worked(running, {**BODY, "prompts": ["more"]})
    registry.job_outputs.clean(registry.jobs.fetched_from)
    assert folder.is_dir()
    assert (await running.delete(f"/v1/jobs/{job['id']}")).status_code == 200
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "param", "code"),
    [
        ({"prompts": []}, "/prompts", "invalid_value"),
        ({"prompts": [{"tokens": []}]}, None, "invalid_value"),
        ({"data": "{}"}, None, "invalid_value"),
        ({"prompts": None, "data": '"a"\n7'}, "/data", "invalid_texts"),
        ({"layers": [1, 77]}, "/layers/1", "layer_out_of_range"),
        ({"points": [{"layer": 1}]}, "/points", "invalid_option"),
        ({"layers": None, "points": [{"layer": 99}]}, "/points/0", "layer_out_of_range"),
        ({"stored": "int8"}, "/stored", "invalid_value"),
        ({"stride": 0}, "/stride", "invalid_value"),
        ({"pooled": "sum"}, "/pooled", "invalid_value"),
        ({"context": 8, "answer_tokens": 2}, "/context", "invalid_option"),
        ({"where": {"phases": ["later"]}}, "/where/phases/0", "invalid_value"),
        ({"where": {"tokens": ["two words"]}}, "/where/tokens/0", "not_one_token"),
        ({"steering": {"interventions": []}}, "/steering/interventions", None),
        (
            {"steering": {"interventions": [{"kind": "add", "vector": "gloom"}]}},
            "/steering/interventions/0/vector",
            "unknown_vector",
        ),
        ({"folder": "/etc"}, "/folder", "unknown_field"),
    ],
)
async def test_bad_requests_say_where(
    http: httpx.AsyncClient, change: dict[str, Any], param: str | None, code: str | None
) -> None:
    body = {name: one for name, one in {**BODY, **change}.items() if one is not None}
    answer = await http.post("/v1/steering/capture", json=body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert error["code"] == (code or error["code"])
    if param is not None:
        assert error["param"] == param, error
    assert (await http.get("/v1/jobs")).json()["data"] == []


async def test_what_shows_only_in_the_texts_fails_the_job_and_leaves_nothing(
    running: httpx.AsyncClient, registry: Registry
) -> None:
    for change, code in (
        ({"prompts": [{"tokens": [5, 99_999]}]}, "unknown_token"),
        ({"where": {"after": ["nowhere"]}}, "nothing_selected"),
        ({"where": {"roles": ["user"]}}, "no_messages"),
    ):
        job = await worked(running, {**BODY, **change})
        assert (job["state"], job["error"]["code"]) == ("failed", code), job
        assert not registry.job_outputs.folder(job["id"]).exists()
        files = await running.get(f"/v1/jobs/{job['id']}/files")
        assert files.json()["data"] == []


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ({"capture_rows": 6}, "rows, and 6 are left to it"),
        ({"capture_bytes": 2000}, "bytes, and 2000 are left to it"),
    ],
)
async def test_a_server_keeps_no_more_than_it_has_room_for(
    engine: FakeEngine,
    registry: Registry,
    in_process: Callable[[FastAPI], httpx.AsyncClient],
    limits: dict[str, int],
    said: str,
) -> None:
    app = create_app(engine, registry, ServerSettings(**limits))
    async with in_process(app) as http:
        app.state.steer.jobs.start()
        job = await worked(http, BODY)
        assert (job["state"], job["error"]["code"]) == ("failed", "capture_too_large")
        assert said in job["error"]["message"]
        await asyncio.to_thread(app.state.steer.jobs.stop, LIVENESS_SECONDS)
    assert registry.job_outputs.bytes_beside("") == 0


async def test_what_is_kept_takes_room(
    engine: FakeEngine, registry: Registry, in_process: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    app = create_app(engine, registry, ServerSettings(capture_bytes=9000))
    async with in_process(app) as http:
        app.state.steer.jobs.start()
        body = {**BODY, "layers": [1], "prompts": ["a text of some length"] * 4}
        first = await worked(http, body)
        assert first["state"] == "succeeded", first
        second = await worked(http, body)
        assert second["error"]["code"] == "capture_too_large"
        await http.delete(f"/v1/jobs/{first['id']}")
        assert (await worked(http, body))["state"] == "succeeded"
        await asyncio.to_thread(app.state.steer.jobs.stop, LIVENESS_SECONDS)


async def test_a_server_may_keep_none(
    engine: FakeEngine, registry: Registry, in_process: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    app = create_app(engine, registry, ServerSettings(capture_bytes=0))
    async with in_process(app) as http:
        refused = await http.post("/v1/steering/capture", json=BODY)
        assert (refused.status_code, refused.json()["error"]["code"]) == (400, "no_captures")


async def test_the_key_guards_files(
    engine: FakeEngine, registry: Registry, in_process: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    app = create_app(engine, registry, ServerSettings(api_key="secret"))
    async with in_process(app) as http:
        for path in ("/v1/jobs/x/files", "/v1/jobs/x/files/y"):
            assert (await http.get(path)).status_code == 401
        assert (await http.post("/v1/steering/capture", json=BODY)).status_code == 401


def test_the_command_fetches_what_is_missing(live: str, tmp_path: Path) -> None:
    def steer(*arguments: object, code: int = 0) -> str:
        done = CliRunner().invoke(commands, ["jobs", *map(str, arguments), "-u", live])
        assert done.exit_code == code, done.output
        return done.output

    params, folder = tmp_path / "capture.json", tmp_path / "states"
    params.write_text(json.dumps(BODY))
    job_id = steer("submit", "capture", params).strip()
    steer("watch", job_id)
    assert "2 files" in steer("fetch", job_id, folder)
    found = CapturedStates.open(folder, HookPoint(1), verify=True)
    kept = folder / "states-00000.safetensors"
    before = kept.stat().st_mtime_ns
    steer("fetch", job_id, folder)
    assert kept.stat().st_mtime_ns == before
    kept.write_bytes(kept.read_bytes()[:-1] + b"x")
    steer("fetch", job_id, folder)
    again = CapturedStates.open(folder, HookPoint(1), verify=True)
    every = np.arange(len(found))
    assert torch.equal(again.rows(every), found.rows(every))
    assert "unknown_job" in steer("fetch", "job-x", folder, code=2)
