"""Jobs over HTTP: asking, following, cancelling, forgetting, and all that may be wrong."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from counting_jobs import QUICK, CountParams, Gate, counting, finished, wait_for
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS
from prometheus_client.parser import text_string_to_metric_families

from steer.engines.base import SamplingParams
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.engines.plans import plans_of
from steer.fit.measure.scoring import words_scorer
from steer.fit.measure.sweep import dose_response
from steer.jobs import JobRunner
from steer.prompts import as_chat
from steer.registry.registry import Registry
from steer.spec import parse_spec
from steer_server.app import create_app
from steer_server.routes.job_events import follow
from steer_server.settings import ServerSettings

PAIRS = [
    {
        "positive": [{"role": "user", "content": f"a happy day {n}"}],
        "negative": [{"role": "user", "content": f"a sad day {n}"}],
    }
    for n in range(12)
]
FIT = {"name": "happy", "pairs": PAIRS, "layers": [1, 2], "choose": "separation"}
SWEEP = {
    "vector": "joy",
    "prompts": ["How are you?", [{"role": "user", "content": "And you?"}]],
    "score": "words:joy,sunny,wow",
    "strengths": [2, 1],
    "max_tokens": 24,
}
CALIBRATE = {**{k: v for k, v in SWEEP.items() if k != "strengths"}, "strengths": [1, 2, 4]}
EVALUATE = {
    "methods": [
        {
            "name": "twice",
            "steering": {"interventions": [{"kind": "add", "vector": "joy", "strength": 2}]},
        },
        {"name": "saved", "profile": "merry"},
    ],
    "prompts": SWEEP["prompts"],
    "score": SWEEP["score"],
    "instruction": "Be merry.",
    "max_tokens": 24,
}
JOY = {"name": "joy", "description": "Joy", "instruction": "Be merry.", "score": SWEEP["score"]}
SUITE = {
    "suite": {
        "name": "small",
        "concepts": [JOY],
        "prompts": ["How are you?", "And you?"],
        "factors": [1.0],
        "max_tokens": 8,
    },
    "methods": [
        {
            "name": "added",
            "steering": {"interventions": [{"kind": "add", "vector": "{concept}"}]},
        }
    ],
    "nulls": 1,
}


def suite_with(**changes: Any) -> dict[str, Any]:
    """The suite, its concept changed."""
    return {**SUITE, "suite": {**SUITE["suite"], "concepts": [{**JOY, **changes}]}}  # type: ignore[dict-item]


DONE = {"succeeded", "failed", "cancelled", "interrupted"}


@pytest.fixture
def gate() -> Gate:
    return Gate()


@pytest.fixture
async def running(app: FastAPI, http: httpx.AsyncClient) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server whose jobs run."""
    jobs: JobRunner = app.state.steer.jobs
    jobs.start()
    yield http
    await asyncio.to_thread(jobs.stop, LIVENESS_SECONDS)


def counter(app: FastAPI, gate: Gate) -> JobRunner:
    """In the place of the app's runner, one that counts under the test's control."""
    serving = app.state.steer
    runner = JobRunner(
        serving.engine,
        serving.registry,
        {"count": counting(gate)},
        QUICK,
        ended=serving.metrics.job,
    )
    object.__setattr__(serving, "jobs", runner)
    return runner


def parsed(text: str) -> list[dict[str, Any]]:
    """Server-sent events with their fields; comments left out."""
    events = []
    for block in text.split("\n\n")[:-1]:
        if block.startswith(":"):
            continue
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        events.append({**fields, "data": json.loads(fields["data"])})
    return events


async def ended(http: httpx.AsyncClient, job_id: str) -> dict[str, Any]:
    """The job at its end, by following it."""
    last = parsed((await http.get(f"/v1/jobs/{job_id}/events")).text)[-1]
    assert last["event"] == "end"
    return last["data"]


async def test_a_vector_is_fitted_and_steers(running: httpx.AsyncClient, chat: Any) -> None:
    response = await running.post("/v1/steering/fit", json=FIT)
    assert response.status_code == 202, response.text
    asked = response.json()
    assert response.headers["location"] == f"/v1/jobs/{asked['id']}"
    assert (asked["object"], asked["kind"], asked["attempt"]) == ("job", "fit", asked["attempt"])
    assert asked["request"]["pairs"] == 12
    assert "happy day" not in response.text
    job = await ended(running, asked["id"])
    assert (job["state"], job["error"]) == ("succeeded", None)
    assert (job["progress"]["done"], job["progress"]["total"]) == (24, 24)
    result = job["result"]
    assert (result["name"], result["version"], result["created"]) == ("happy", 1, True)
    assert result["layers"] == [1, 2]
    shown = (await running.get(f"/v1/steering/vectors/{result['vector']}")).json()
    assert shown["card"]["provenance"]["pairs"] == 12
    spec = {"interventions": [{"kind": "add", "vector": result["vector"]}]}
    steered = await running.post("/v1/chat/completions", json=chat(steering=spec))
    assert steered.json()["steering"]["tokens_steered"] > 0
    assert (await running.get(f"/v1/jobs/{asked['id']}")).json() == job


async def test_json_lines_are_the_same_as_an_array(running: httpx.AsyncClient) -> None:
    lines = "".join(json.dumps(pair) + "\n" for pair in PAIRS)
    hashes = []
    for data in ({"pairs": PAIRS}, {"data": lines}):
        response = await running.post("/v1/steering/fit", json={"name": "happy", **data})
        hashes.append((await ended(running, response.json()["id"]))["result"]["sha256"])
    assert hashes[0] == hashes[1]


async def test_a_calibrated_vector_takes_strengths_by_effect(
    running: httpx.AsyncClient, chat: Any
) -> None:
    effect = {"kind": "add", "vector": "joy", "strength": {"effect": 0.5}}
    steering = {"interventions": [effect]}
    before = await running.post("/v1/chat/completions", json=chat(steering=steering))
    assert before.json()["error"]["code"] == "not_calibrated"
    response = await running.post("/v1/steering/calibrate", json=CALIBRATE)
    assert response.status_code == 202, response.text
    job = await ended(running, response.json()["id"])
    assert job["state"] == "succeeded", job
    assert job["progress"]["done"] == job["progress"]["total"] == 2 * (2 + 3) + 8 * (1 + 2)
    result = job["result"]
    assert [one["kind"] for one in result["calibration"]["nulls"]["nulls"]] == [
        *["isotropic"] * 4,
        *["covariance"] * 4,
    ]
    assert (result["version"], result["created"]) == (2, True)
    assert [dose["strength"] for dose in result["calibration"]["doses"]] == [0, 1, 2, 4]
    after = (await running.post("/v1/chat/completions", json=chat(steering=steering))).json()
    (used,) = after["steering"]["strengths"]
    assert used["requested"] == {"effect": 0.5}
    assert 0 < used["strength"] <= result["safe_strength"]


@pytest.mark.parametrize(("route", "asked"), [("sweep", SWEEP), ("calibrate", CALIBRATE)])
async def test_all_layers_are_those_that_the_vector_has(
    running: httpx.AsyncClient, registry: Registry, route: str, asked: dict[str, Any]
) -> None:
    own = list(registry.vector("joy").card.layers)
    results = []
    for layers in ("all", own):
        response = await running.post(f"/v1/steering/{route}", json={**asked, "layers": layers})
        assert response.status_code == 202, response.text
        job = await ended(running, response.json()["id"])
        assert job["state"] == "succeeded", job
        results.append(job["result"])
    if route == "sweep":
        assert results[0] == results[1]
    else:  # the second is of the vector that the first has calibrated
        assert [one["calibration"]["layers"] for one in results] == [own, own]


async def test_methods_are_compared_with_the_prompt_alone(running: httpx.AsyncClient) -> None:
    saved = {"name": "merry", "spec": {"interventions": [{"kind": "add", "vector": "joy"}]}}
    assert (await running.post("/v1/steering/profiles", json=saved)).is_success
    response = await running.post("/v1/steering/evaluate", json=EVALUATE)
    assert response.status_code == 202, response.text
    job = await ended(running, response.json()["id"])
    assert job["state"] == "succeeded", job
    rows = job["result"]["rows"]
    assert [(row["name"], row["kind"]) for row in rows] == [
        ("unsteered", "unsteered"),
        ("prompt only", "prompt"),
        ("twice", "steering"),
        ("saved", "steering"),
    ]
    assert job["progress"]["done"] == job["progress"]["total"] == 8 + 2 * 8 * (1 + 2)
    assert job["request"]["prompts"] == 2
    for row in rows[2:]:
        assert len(row["nulls"]["nulls"]) == 8
        assert 0 < row["nulls"]["p_value"] <= 1
        assert row["anti_steered"]["value"] == 0


async def test_a_suite_is_rated_by_concept(running: httpx.AsyncClient) -> None:
    response = await running.post("/v1/steering/suite", json=SUITE)
    assert response.status_code == 202, response.text
    job = await ended(running, response.json()["id"])
    assert job["state"] == "succeeded", job
    assert job["progress"]["done"] == job["progress"]["total"]
    assert job["request"]["suite"] == "small"
    assert [row["method"] for row in job["result"]["methods"]] == [
        "unsteered",
        "prompt only",
        "added",
    ]
    (concept,) = job["result"]["concepts"]
    assert (concept["concept"], concept["rows"][2]["factor"]) == ("joy", 1.0)


async def test_a_sweep_measures_every_strength(
    running: httpx.AsyncClient, engine: FakeEngine, registry: Registry
) -> None:
    response = await running.post("/v1/steering/sweep", json=SWEEP)
    assert response.status_code == 202, response.text
    job = await ended(running, response.json()["id"])
    assert job["state"] == "succeeded", job
    result = job["result"]
    assert [dose["strength"] for dose in result["doses"]] == [1, 2]
    assert result.pop("vector") == registry.entry("vector", "joy").id
    assert result.pop("score") == SWEEP["score"]
    plans = plans_of(engine, registry)
    own = dose_response(
        engine,
        # As a user would ask them: this model is for chats.
        [as_chat(engine.tokenizer, prompt) for prompt in SWEEP["prompts"]],
        lambda strength: plans.plan(
            parse_spec({"interventions": [{"kind": "add", "vector": "joy", "strength": strength}]})
        ),
        [1.0, 2.0],
        words_scorer(["joy", "sunny", "wow"]),
        sampling=SamplingParams(max_tokens=24, temperature=0, seed=0, logprobs=0),
        examples=3,
    )
    assert result == json.loads(json.dumps(own.as_json()))
    assert result["unsteered"]["score"] == 0 < max(dose["score"] for dose in result["doses"])
    assert job["progress"]["done"] == 6


async def test_a_file_is_imported(
    running: httpx.AsyncClient, registry: Registry, app: FastAPI
) -> None:
    data = registry.content("vector", "joy").read()
    response = await running.post(
        "/v1/steering/import",
        files={"file": ("delight.safetensors", data)},
        data={"layers": "2-3", "strength": "0.5", "artefact": "vector"},
    )
    assert response.status_code == 202, response.text
    assert response.json()["request"]["layers"] == [2, 3]
    job = await ended(running, response.json()["id"])
    assert job["state"] == "succeeded", job
    card = registry.vector("delight").card
    assert (card.default_strength, card.used_layers) == (0.5, (2, 3))
    assert job["result"]["id"] == registry.entry("vector", "delight").id
    folder = registry.job_files.folder(job["id"])
    await asyncio.to_thread(app.state.steer.jobs.stop, LIVENESS_SECONDS)
    assert not folder.exists()


async def test_an_import_waits_on_disk_for_the_next_server(
    http: httpx.AsyncClient, registry: Registry, app: FastAPI, tmp_path: Path
) -> None:
    """This server takes the file and never runs jobs; another on the registry does."""
    data = registry.content("vector", "joy").read()
    response = await http.post("/v1/steering/import", files={"file": ("late.safetensors", data)})
    job_id = response.json()["id"]
    with Registry.open(tmp_path / "registry") as other:
        serving = create_app(FakeEngine(), other, ServerSettings()).state.steer
        serving.jobs.start()
        job = await asyncio.to_thread(finished, serving.jobs, job_id)
        assert job.state == "succeeded", job.error
        serving.jobs.stop()
    assert registry.vector("late").sha256 == registry.vector("joy").sha256


async def test_an_import_has_to_fit_the_model_or_name_another(
    running: httpx.AsyncClient, registry: Registry
) -> None:
    sent = {
        "wide": registry.content("vector", "wide").read(),
        "deep": registry.content("vector", "deep").read(),
    }
    for name, code in (("wide", "wrong_width"), ("deep", "layer_out_of_range")):
        for fields in ({}, {"model": "fake-model"}):
            files = {"file": (f"my-{name}.safetensors", sent[name])}
            response = await running.post("/v1/steering/import", files=files, data=fields)
            job = await ended(running, response.json()["id"])
            assert (job["state"], job["error"]["code"]) == ("failed", code)
            assert job["error"]["param"] == "/file"
        shown = await running.get(f"/v1/steering/vectors/my-{name}")
        assert shown.status_code == 404
        response = await running.post("/v1/steering/import", files=files, data={"model": "another"})
        job = await ended(running, response.json()["id"])
        assert job["state"] == "succeeded", job
        assert registry.vector(f"my-{name}").card.model == "another"


async def test_an_import_for_this_model_waits_for_a_server_of_it(
    http: httpx.AsyncClient, registry: Registry, tmp_path: Path
) -> None:
    """A server of another model may run the import that names another model, and no other."""
    data = registry.content("vector", "joy").read()
    ours, theirs = [
        (await http.post("/v1/steering/import", files={"file": (name, data)}, data=fields)).json()
        for name, fields in (("ours", {}), ("theirs", {"model": "another"}))
    ]
    with Registry.open(tmp_path / "registry") as other:
        engine = FakeEngine(fake_model(name="a-third"))
        serving = create_app(engine, other, ServerSettings()).state.steer
        serving.jobs.start()
        job = await asyncio.to_thread(finished, serving.jobs, theirs["id"])
        assert job.state == "succeeded", job.error
        assert serving.jobs.store.get(ours["id"]).state == "queued"
        await asyncio.to_thread(serving.jobs.stop)


async def test_a_file_that_is_none_fails_the_job(running: httpx.AsyncClient) -> None:
    response = await running.post(
        "/v1/steering/import", files={"file": ("x.gguf", b"no such thing")}
    )
    job = await ended(running, response.json()["id"])
    assert (job["state"], job["error"]["param"]) == ("failed", "/file")
    assert job["error"]["code"] == "unknown_format"


@pytest.mark.parametrize(
    ("route", "body", "param", "code"),
    [
        ("fit", {"pairs": PAIRS}, "/name", "missing_field"),
        ("fit", {**FIT, "name": "no spaces"}, "/name", "invalid_value"),
        ("fit", {**FIT, "name": "a@123456"}, "/name", "invalid_value"),
        ("fit", {"name": "x"}, None, "invalid_value"),
        ("fit", {**FIT, "data": "{}"}, None, "invalid_value"),
        ("fit", {**FIT, "pairs": PAIRS[:1]}, "/pairs", "invalid_value"),
        ("fit", {**FIT, "pairs": [PAIRS[0], {"positive": "a"}]}, "/pairs/1/negative", None),
        ("fit", {**FIT, "pairs": [*PAIRS, {"positive": "a", "negative": 3}]}, None, None),
        ("fit", {"name": "x", "data": "no json"}, "/data", "invalid_pairs"),
        ("fit", {"name": "x", "data": '{"positive": "a"}'}, "/data", "invalid_pairs"),
        ("fit", {"name": "x", "data": "\n"}, "/data", "no_pairs"),
        ("fit", {"name": "x", "data": '{"positive": "a", "negative": "b"}'}, "/data", "no_pairs"),
        ("fit", {**FIT, "method": "magic"}, "/method", "invalid_value"),
        ("fit", {**FIT, "site": "attic"}, "/site", "invalid_value"),
        ("fit", {**FIT, "layers": [0, 6]}, "/layers/1", "layer_out_of_range"),
        ("fit", {**FIT, "layers": []}, "/layers", "invalid_value"),
        ("fit", {**FIT, "positions": "first"}, "/positions", "invalid_value"),
        ("fit", {**FIT, "where": "never"}, "/where", "invalid_value"),
        ("fit", {**FIT, "held_out": 0.95}, "/held_out", "invalid_value"),
        ("fit", {**FIT, "seed": -1}, "/seed", "invalid_value"),
        ("fit", {**FIT, "best": 0}, "/best", "invalid_value"),
        ("fit", {**FIT, "description": "x" * 5000}, "/description", "invalid_value"),
        ("fit", {**FIT, "licence": "x" * 300}, "/licence", "invalid_value"),
        ("fit", {**FIT, "batch": 5}, "/batch", "unknown_field"),
        ("sweep", {**SWEEP, "vector": "joi"}, "/vector", "unknown_vector"),
        ("sweep", {**SWEEP, "vector": "wide"}, "/vector", "wrong_width"),
        ("sweep", {**SWEEP, "vector": ""}, "/vector", "invalid_value"),
        ("sweep", {**SWEEP, "prompts": []}, "/prompts", "invalid_value"),
        ("sweep", {**SWEEP, "prompts": [""]}, None, "invalid_value"),
        ("sweep", {**SWEEP, "prompts": ["a"] * 7000}, "/prompts", "too_large"),
        ("sweep", {**SWEEP, "score": "python:os:getcwd"}, "/score", "scorer_refused"),
        ("sweep", {**SWEEP, "score": "words:@/etc/passwd"}, "/score", "scorer_refused"),
        ("sweep", {**SWEEP, "score": "regex:(("}, "/score", "invalid_scorer"),
        ("sweep", {**SWEEP, "score": "regex:" + "a" * 2000}, "/score", "invalid_scorer"),
        ("sweep", {**SWEEP, "score": "words: , "}, "/score", "invalid_scorer"),
        ("sweep", {**SWEEP, "score": "joy"}, "/score", "invalid_scorer"),
        ("sweep", {**SWEEP, "strengths": []}, "/strengths", "invalid_value"),
        ("sweep", {**SWEEP, "strengths": [1, 1]}, None, "invalid_value"),
        ("sweep", {**SWEEP, "layers": [77]}, "/layers", "layer_out_of_range"),
        ("sweep", {**SWEEP, "where": {"phases": ["later"]}}, "/where/phases/0", "invalid_value"),
        ("sweep", {**SWEEP, "max_tokens": 0}, "/max_tokens", "invalid_value"),
        ("sweep", {**SWEEP, "temperature": -1}, "/temperature", "invalid_value"),
        ("sweep", {**SWEEP, "seed": -1}, "/seed", "invalid_value"),
        ("sweep", {**SWEEP, "examples": 99}, "/examples", "invalid_value"),
        ("sweep", {**SWEEP, "extra": 1}, "/extra", "unknown_field"),
        ("sweep", {**SWEEP, "score": "judge:http://127.0.0.1/v1"}, "/score", "scorer_refused"),
        ("sweep", {**SWEEP, "score": "probe:joi"}, "/score", "unknown_vector"),
        ("calibrate", {**CALIBRATE, "vector": "joi"}, "/vector", "unknown_vector"),
        ("calibrate", {**CALIBRATE, "vector": "wide"}, "/vector", "wrong_width"),
        ("calibrate", {**CALIBRATE, "prompts": []}, "/prompts", "invalid_value"),
        ("calibrate", {**CALIBRATE, "score": "python:os:getcwd"}, "/score", "scorer_refused"),
        ("calibrate", {**CALIBRATE, "strengths": [-1]}, "/strengths", "invalid_option"),
        ("calibrate", {**CALIBRATE, "layers": [77]}, "/layers", "layer_out_of_range"),
        ("calibrate", {**CALIBRATE, "min_valid": 2}, "/min_valid", "invalid_value"),
        (
            "calibrate",
            {**CALIBRATE, "max_perplexity_ratio": 0},
            "/max_perplexity_ratio",
            "invalid_value",
        ),
        ("calibrate", {**CALIBRATE, "extra": 1}, "/extra", "unknown_field"),
        ("evaluate", {**EVALUATE, "methods": []}, "/methods", "invalid_value"),
        ("evaluate", EVALUATE, "/methods/1/profile", "unknown_profile"),
        (
            "evaluate",
            {**EVALUATE, "methods": [{"name": "x", "steering": {"interventions": []}}]},
            "/methods/0/steering/interventions",
            "invalid_spec",
        ),
        ("evaluate", {**EVALUATE, "methods": [{"name": "x"}]}, "/methods/0", "invalid_value"),
        ("evaluate", {**EVALUATE, "instruction": ""}, "/instruction", "invalid_value"),
        ("evaluate", {**EVALUATE, "score": "joy"}, "/score", "invalid_scorer"),
        ("evaluate", {**EVALUATE, "nulls": -1}, "/nulls", "invalid_value"),
        ("suite", suite_with(score=None), "/suite/concepts/0/score", "no_scorer"),
        ("suite", suite_with(score="judge:x"), "/suite/concepts/0/score", "scorer_refused"),
        (
            "suite",
            suite_with(name="gloom"),
            "/methods/0/steering/interventions/0/vector",
            "unknown_vector",
        ),
        (
            "suite",
            {**SUITE, "methods": [{"name": "x", "fit": "diffmean"}, {"name": "y", "fit": "reps"}]},
            "/methods/1/fit",
            "no_gradients",
        ),
        ("suite", {**SUITE, "methods": [{"name": "x", "fit": "magic"}]}, "/methods/0/fit", None),
        ("fit", {**FIT, "refine": {"sae": "none"}}, "/refine/sae", "unknown_sae"),
        ("fit", {**FIT, "refine": {}}, "/refine/sae", "missing_field"),
        ("import", {"name": "x"}, "/source", "missing_field"),
        ("import", {"source": "hf://org/repo/file"}, "/name", "missing_field"),
        ("import", {"name": "x", "source": "https://host/f"}, "/source", "unsupported_source"),
        ("import", {"name": "x", "source": "hf://org"}, "/source", "invalid_reference"),
        ("import", {"name": "x", "source": "hf://a/b/c", "from": "me"}, "/from", "invalid_option"),
        ("import", {"name": "x", "source": "/etc/passwd"}, "/source", "unsupported_source"),
        ("import", {"name": "x", "source": "file:///etc/x"}, "/source", "unsupported_source"),
        ("import", {"name": "x", "source": "a" * 3000}, "/source", "invalid_value"),
        ("import", {"name": "x", "source": "hf://a", "artefact": "y"}, "/artefact", None),
        ("import", {"name": "x", "source": "hf://a", "layers": [-1]}, "/layers/0", None),
        ("import", {"name": "x", "source": "hf://a", "strength": "much"}, "/strength", None),
        ("import", {"name": "x", "source": "hf://a", "layer_offset": 0.5}, "/layer_offset", None),
        ("import", {"name": "x", "source": "hf://a", "y": 1}, "/y", "unknown_field"),
        ("import", [], None, "invalid_json"),
    ],
)
async def test_bad_requests_say_where(
    http: httpx.AsyncClient, route: str, body: Any, param: str | None, code: str | None
) -> None:
    response = await http.post(f"/v1/steering/{route}", json=body)
    error = response.json()["error"]
    assert response.status_code in (400, 404, 413), response.text
    assert error["code"] == (code or error["code"])
    if param is not None:
        assert error["param"] == param, error
    assert (await http.get("/v1/jobs")).json()["data"] == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"layers": "two"}, "/layers"),
        ({"layers": "3-1"}, "/layers"),
        ({"layers": "0-999999999999"}, "/layers"),
        ({"layers": "1,1"}, "/layers"),
        ({"strength": "much"}, "/strength"),
        ({"name": "no spaces"}, "/name"),
        ({"source": "hf://a"}, "/source"),
        ({"colour": "red"}, "/colour"),
    ],
)
async def test_bad_form_fields_say_which(
    http: httpx.AsyncClient, registry: Registry, fields: dict[str, str], param: str
) -> None:
    files = {"file": ("x.safetensors", b"1234")}
    response = await http.post("/v1/steering/import", files=files, data=fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith(param)
    left = [one for one in registry.job_files.folder("x").parent.iterdir() if one.is_dir()]
    assert left == []


async def test_bodies_have_their_kind_and_their_limit(
    http: httpx.AsyncClient, settings: ServerSettings
) -> None:
    for route in ("fit", "sweep", "calibrate", "evaluate", "import"):
        plain = await http.post(
            f"/v1/steering/{route}", content=b"{}", headers={"content-type": "text/plain"}
        )
        assert (plain.status_code, plain.json()["error"]["code"]) == (415, "unsupported_media_type")
        large = await http.post(
            f"/v1/steering/{route}",
            content=b" " * (settings.max_body_bytes + 1),
            headers={"content-type": "application/json"},
        )
        assert large.status_code == 413
    upload = {"file": ("x", b"1" * (settings.max_upload_bytes + 1))}
    assert (await http.post("/v1/steering/import", files=upload)).status_code == 413


async def test_an_expression_without_end_fails_its_job_alone(
    running: httpx.AsyncClient, chat: Any
) -> None:
    body = {**SWEEP, "score": r"regex:^(a|.|e|\w)*$(?<=0)", "max_tokens": 60}
    response = await running.post("/v1/steering/sweep", json=body)
    job = await ended(running, response.json()["id"])
    assert (job["state"], job["error"]["code"]) == ("failed", "scorer_too_slow")
    assert (await running.post("/v1/chat/completions", json=chat())).status_code == 200


async def test_jobs_are_listed_by_kind_and_state(
    http: httpx.AsyncClient, app: FastAPI, gate: Gate
) -> None:
    runner = counter(app, gate)
    ids = [runner.submit("count", CountParams()).id for _ in range(5)]
    await http.post(f"/v1/jobs/{ids[0]}/cancel")
    page = (await http.get("/v1/jobs", params={"limit": 2})).json()
    assert [job["id"] for job in page["data"]] == ids[:2:-1]
    assert page["has_more"]
    rest = (await http.get("/v1/jobs", params={"limit": 3, "offset": 2})).json()
    assert [job["id"] for job in rest["data"]] == ids[2::-1]
    assert not rest["has_more"]
    cancelled = (await http.get("/v1/jobs", params={"state": "cancelled"})).json()
    assert [job["id"] for job in cancelled["data"]] == ids[:1]
    assert (await http.get("/v1/jobs", params={"kind": "fit"})).json()["data"] == []
    for query in ({"state": "lost"}, {"limit": 0}, {"offset": -1}, {"limit": "x"}):
        assert (await http.get("/v1/jobs", params=query)).status_code == 400


async def test_cancel_and_delete(http: httpx.AsyncClient, app: FastAPI, gate: Gate) -> None:
    runner = counter(app, gate)
    job = runner.submit("count", CountParams())
    url = f"/v1/jobs/{job.id}"
    refused = await http.delete(url)
    assert (refused.status_code, refused.json()["error"]["code"]) == (409, "job_not_finished")
    for _ in range(2):
        response = await http.post(f"{url}/cancel")
        assert (response.status_code, response.json()["state"]) == (200, "cancelled")
    assert (await http.delete(url)).json() == {"id": job.id, "deleted": True}
    for call in (http.get(url), http.delete(url), http.post(f"{url}/cancel")):
        gone = await call
        assert (gone.status_code, gone.json()["error"]["code"]) == (404, "unknown_job")
    assert (await http.get(f"{url}/events")).status_code == 404
    runner.start()
    done = runner.submit("count", CountParams())
    await asyncio.to_thread(finished, runner, done.id)
    late = await http.post(f"/v1/jobs/{done.id}/cancel")
    assert (late.status_code, late.json()["error"]["code"]) == (409, "job_finished")
    await asyncio.to_thread(runner.stop, LIVENESS_SECONDS)


async def test_a_full_queue_is_answered_with_503(
    app: FastAPI, http: httpx.AsyncClient, settings: ServerSettings
) -> None:
    for _ in range(settings.job_queue):
        assert (await http.post("/v1/steering/fit", json=FIT)).status_code == 202
    response = await http.post("/v1/steering/fit", json=FIT)
    assert (response.status_code, response.json()["error"]["code"]) == (503, "at_capacity")
    assert response.headers["retry-after"]


async def test_events_are_replayed_and_end(
    http: httpx.AsyncClient, app: FastAPI, gate: Gate
) -> None:
    runner = counter(app, gate)
    job = runner.submit("count", CountParams(steps=3))
    runner.start()
    await asyncio.to_thread(finished, runner, job.id)
    url = f"/v1/jobs/{job.id}/events"
    response = await http.get(url)
    assert response.headers["content-type"].startswith("text/event-stream")
    events = parsed(response.text)
    numbers = [int(event["id"]) for event in events[:-1]]
    assert numbers == list(range(1, len(numbers) + 1))
    assert events[0]["data"]["data"] == {"state": "queued", "attempt": 0}
    assert events[-2]["data"]["data"] == {"state": "succeeded"}
    assert events[-1]["event"] == "end"
    assert events[-1]["data"]["result"] == {"counted": 3, "files": []}
    again = parsed((await http.get(url, headers={"last-event-id": "2"})).text)
    assert again == events[2:]
    for unknown in ("x", "-1", "٣", "9" * 12, "9" * 5000):
        headers = {"last-event-id": unknown.encode()}
        assert parsed((await http.get(url, headers=headers)).text) == events
    over = await http.get(url, headers={"last-event-id": str(numbers[-1])})
    assert (over.status_code, over.content) == (204, b"")
    polled = (await http.get(url, params={"after": 2})).json()
    assert [event["number"] for event in polled["data"]] == numbers[2:]
    assert polled["job"]["state"] == "succeeded"
    assert (await http.get(url, params={"after": 999})).json()["data"] == []
    for wrong in (-1, 10**12, 10**30, "9" * 5000):
        assert (await http.get(url, params={"after": wrong})).status_code == 400
    await asyncio.to_thread(runner.stop, LIVENESS_SECONDS)


async def test_events_come_while_the_job_runs(app: FastAPI, gate: Gate, live: str) -> None:
    """Each step is seen before the next is allowed; so nothing waits for the end or a timer."""
    gate.open = False
    runner = counter(app, gate)
    runner.start()
    job = runner.submit("count", CountParams(steps=3))
    seen = []
    async with (
        httpx.AsyncClient(base_url=live, timeout=LIVENESS_SECONDS) as client,
        client.stream("GET", f"/v1/jobs/{job.id}/events") as response,
    ):
        async for line in response.aiter_lines():
            if not line.startswith("data: "):
                continue
            event = json.loads(line.removeprefix("data: "))
            seen.append(event)
            running = event.get("data", {}).get("state") == "running"
            if running or event.get("type") == "progress":
                gate.allow(1)
    done = [event["data"]["done"] for event in seen if event.get("type") == "progress"]
    assert done[:3] == [1, 2, 3]
    assert seen[-1]["state"] == "succeeded"
    await asyncio.to_thread(runner.stop, LIVENESS_SECONDS)


async def test_a_follower_who_leaves_leaves_nothing(
    app: FastAPI, gate: Gate, live: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate.open = False
    runner = counter(app, gate)
    left = threading.Semaphore(0)
    real = runner.changes.listening

    @contextmanager
    def listening(*args: Any) -> Iterator[None]:
        try:
            with real(*args):
                yield
        finally:
            left.release()

    monkeypatch.setattr(runner.changes, "listening", listening)
    runner.start()
    job = runner.submit("count", CountParams(steps=100))
    async with httpx.AsyncClient(base_url=live, timeout=LIVENESS_SECONDS) as client:
        for _ in range(3):
            async with client.stream("GET", f"/v1/jobs/{job.id}/events") as response:
                async for line in response.aiter_lines():
                    if line.startswith("event:"):
                        break
        assert (await client.get("/health")).status_code == 200
    for _ in range(3):
        assert await asyncio.to_thread(left.acquire, timeout=LIVENESS_SECONDS)
    assert runner.changes.count == 0
    gate.allow(1)
    await asyncio.to_thread(wait_for, runner, job.id, lambda one: one.progress.done == 1)
    runner.cancel(job.id)
    gate.allow(100)
    assert (await asyncio.to_thread(finished, runner, job.id)).state == "cancelled"
    await asyncio.to_thread(runner.stop, LIVENESS_SECONDS)


async def test_a_silence_is_filled_and_a_forgotten_job_ends_it(app: FastAPI, gate: Gate) -> None:
    runner = counter(app, gate)
    job = runner.submit("count", CountParams())
    stream = follow(runner, job.id, 0, look_seconds=0.001, heartbeat_seconds=0)
    assert (await anext(stream)).data["state"] == "queued"
    assert await anext(stream) is None
    runner.store.cancel(job.id)  # as another server would
    runner.store.remove(job.id)
    while (item := await anext(stream)) is None:
        pass
    assert item.code == "unknown_job"
    assert [one async for one in stream] == []
    assert runner.changes.count == 0


async def test_a_job_of_another_server_is_followed(
    app: FastAPI, gate: Gate, http: httpx.AsyncClient
) -> None:
    """Its changes are not told here, so they are looked for."""
    runner = counter(app, gate)
    job = runner.submit("count", CountParams())
    states = []
    async for item in follow(runner, job.id, 0, look_seconds=0.001):
        if item is not None and hasattr(item, "data"):
            states.append(item.data["state"])
        if states == ["queued"]:
            runner.store.cancel(job.id)
    assert states == ["queued", "cancelled"]


async def test_the_key_guards_jobs(
    engine: FakeEngine, registry: Registry, in_process: Callable[[FastAPI], httpx.AsyncClient]
) -> None:
    app = create_app(engine, registry, ServerSettings(api_key="secret"))
    async with in_process(app) as client:
        for method, path in (
            ("GET", "/v1/jobs"),
            ("GET", "/v1/jobs/x"),
            ("GET", "/v1/jobs/x/events"),
            ("POST", "/v1/jobs/x/cancel"),
            ("DELETE", "/v1/jobs/x"),
            ("POST", "/v1/steering/fit"),
            ("POST", "/v1/steering/sweep"),
            ("POST", "/v1/steering/import"),
        ):
            assert (await client.request(method, path)).status_code == 401


async def test_jobs_are_counted(app: FastAPI, gate: Gate, http: httpx.AsyncClient) -> None:
    runner = counter(app, gate)
    await http.post(f"/v1/jobs/{runner.submit('count', CountParams()).id}/cancel")
    runner.start()
    for params in (CountParams(), CountParams(fail_at=0)):
        await asyncio.to_thread(finished, runner, runner.submit("count", params).id)
    await asyncio.to_thread(runner.stop, LIVENESS_SECONDS)
    runner.submit("count", CountParams())
    found = {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families((await http.get("/metrics")).text)
        for sample in family.samples
    }
    for state in ("cancelled", "succeeded", "failed"):
        assert found["steer_jobs_ended_total", "count", state] == 1
        assert found["steer_jobs", "count", state] == 1
    assert found["steer_jobs", "count", "queued"] == 1
    assert found["steer_job_duration_seconds_count", "count"] == 2
