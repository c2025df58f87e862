"""Every way to fit is a route: a job with its data, its progress and its registered result."""

from __future__ import annotations

import asyncio
import hashlib
import inspect
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any, get_args

import httpx
import pytest
import torch
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS, eventually
from pydantic import ValidationError
from tiny_models import byte_model
from typer.testing import CliRunner

from steer.artefacts.control_vector import ControlVector
from steer.cli import app as command_line
from steer.cli.fit import commands
from steer.cli.local import DEMO_MODEL, running_engine
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import Unsupported
from steer.fit import (
    fit,
    fit_act,
    fit_alphasteer,
    fit_angular,
    fit_conceptor,
    fit_concepts,
    fit_detector,
    fit_jacobian_lens,
    fit_labels,
    fit_low_rank,
    fit_lrc,
    fit_nmf,
    fit_oracle,
    fit_prosv,
    fit_psr,
    fit_reps,
    fit_snmf,
    fit_token,
    fit_tuned_lens,
    fit_two_prompts,
    transfer,
)
from steer.fit.data.labels import parse_labelled
from steer.fit.measure.calibrate import calibrate
from steer.fit.measure.evaluate import evaluate
from steer.fit.methods.method import METHODS, UNPAIRED
from steer.fit.methods.transfer import MAPS
from steer.fit.requests.detector import DetectorRequest
from steer.fit.requests.dictionaries import NmfRequest, SnmfRequest
from steer.fit.requests.features.trust import TrustRequest
from steer.fit.requests.inline import LabelledParam
from steer.fit.requests.labels import LabelsRequest
from steer.fit.requests.lenses.jacobian_lens import JacobianLensRequest
from steer.fit.requests.lenses.token import TokenRequest
from steer.fit.requests.lenses.tuned_lens import TunedLensRequest
from steer.fit.requests.linear.act import ActRequest
from steer.fit.requests.linear.alphasteer import AlphaSteerRequest
from steer.fit.requests.linear.angular import AngularRequest
from steer.fit.requests.linear.conceptor import ConceptorRequest
from steer.fit.requests.linear.psr import PsrRequest
from steer.fit.requests.lrc import LrcRequest
from steer.fit.requests.measuring import CalibrateRequest, EvaluateRequest, MeasureRequest
from steer.fit.requests.pairs import PairsRequest, RegisteredVectors
from steer.fit.requests.request import FitRequest
from steer.fit.requests.states import StatesRequest
from steer.fit.requests.table import FIT_REQUESTS
from steer.fit.requests.trained.concepts import ConceptsFitRequest
from steer.fit.requests.trained.low_rank import LowRankRequest
from steer.fit.requests.trained.oracle import OracleRequest
from steer.fit.requests.trained.prosv import ProsvRequest
from steer.fit.requests.trained.reps import RepsRequest
from steer.fit.requests.transfer import TransferRequest
from steer.fit.requests.two_prompts import TwoPromptsRequest
from steer.registry.registry import Registry
from steer_server.app import create_app
from steer_server.settings import ServerSettings

ASKS = [f"where is the {n} fox" for n in ("red", "old", "tall", "wise", "shy", "big", "odd", "wet")]
PAIRS = [{"positive": f"a happy day {n}", "negative": f"a sad day {n}"} for n in range(8)]
SAID = [
    {"text": f"a {colour} {shape} {n}", "pairs": {"colour": colour, "shape": shape}}
    for n, (colour, shape) in enumerate(
        (colour, shape) for colour in ("red", "blue", "white") for shape in ("cube", "ball") * 2
    )
]
TEXTS = [
    {"text": f"{word} day {n}", "label": label}
    for n in range(8)
    for word, label in (("a happy", "joy"), ("such a sad", "grief"), ("one", "plain"))
]
MOODS = [
    {"text": f"{'such a sad' if sad else 'a happy'} day {n}", "label": str(sad).lower()}
    for n in range(20)
    for sad in (True, False)
]
EXERCISES = [{"prompt": ask, "answer": "No."} for ask in ASKS[:4]]
ONE_SIDED = [{"prompt": "a", "chosen": "b"}]
LIKED = [{"prompt": ask, "chosen": "Yes!", "rejected": "No."} for ask in ASKS[:4]]
QUESTIONS = [
    {"prompt": f"a {word} day {n}", "question": "Glad", "answer": said}
    for n in range(10)
    for word, said in (("happy", "y"), ("sad", "n"))
]
PLACED = {"oracle_form": {"message": "{states}: {question}?", "placeholder": "#"}}
"""A byte is a token here, and the papers' placeholder is two."""
FACTS = [
    {"subject": s, "relation": "home", "object": o}
    for s, o in (("fox", "a"), ("owl", "a"), ("cod", "b"), ("eel", "b"))
]
LRC = {"name": "in", "relation": "home", "prompt": "Where does the {subject} live?", "plain": True}

BODIES: dict[str, tuple[dict[str, Any], str, list[dict[str, Any]] | list[str]]] = {
    "fit": ({"name": "happy"}, "pairs", PAIRS),
    "fit/labels": ({"name": "mood"}, "texts", TEXTS),
    "fit/detector": ({"name": "sad", "rate": 0.3}, "texts", MOODS),
    "fit/snmf": ({"name": "group", "layer": 1, "components": 2, "iterations": 3}, "prompts", ASKS),
    "fit/nmf": ({"name": "part", "layer": 1, "components": 2, "iterations": 3}, "prompts", ASKS),
    "fit/low-rank": (
        {"name": "no", "layers": [1], "steps": 3, "batch": 2, "rank": 2},
        "exercises",
        EXERCISES,
    ),
    "fit/tuned-lens": ({"name": "reader", "steps": 2, "rows": 8}, "prompts", [*ASKS, *ASKS]),
    "fit/jacobian-lens": (
        {"name": "disposed", "skip": 1, "tokens": 24, "average": 2},
        "prompts",
        ASKS,
    ),
    "fit/transfer": (
        {"vector": "glad", "from": "tiny", "name": "moved"},
        "prompts",
        [*ASKS, *ASKS],
    ),
    "fit/alphasteer": (
        {"name": "only", "vector": "glad", "steer": "joy", "layers": [1], "null_share": [0.4]},
        "texts",
        TEXTS,
    ),
    "fit/reps": (
        {"name": "liked", "layers": [1], "steps": 2, "batch": 2, "factors": [1.0, 2.0]},
        "preferences",
        LIKED,
    ),
    "fit/prosv": (
        {"name": "ends", "layers": [1], "steps": 2, "batch": 2, "first": 2, "last": 1},
        "preferences",
        LIKED,
    ),
    "fit/psr": (
        {"name": "told", "instruction": "Shout!", "layers": [0, 1], "max_tokens": 4},
        "preferences",
        [*LIKED, *({"prompt": ask, "chosen": "Yes!"} for ask in ASKS)],
    ),
    "fit/concepts": ({"name": "said", "dimensions": 256, "layers": [1]}, "examples", SAID),
    "fit/oracle": (
        {"name": "sibyl", "steps": 3, "batch": 4, "rank": 2, **PLACED},
        "questions",
        QUESTIONS,
    ),
    "fit/act": ({"name": "moved", "layers": [0, 2]}, "pairs", PAIRS),
    "fit/conceptor": (
        {"name": "fox", "layers": [1], "aperture": 2.0, "max_error": 0.2},
        "prompts",
        ASKS,
    ),
    "fit/angular": ({"name": "turn"}, "pairs", PAIRS),
}
KINDS = {
    "fit/low-rank": "low_rank",
    "fit/alphasteer": "low_rank",
    "fit/psr": "low_rank",
    "fit/conceptor": "low_rank",
    "fit/act": "affine",
    "fit/detector": "detector",
    "fit/tuned-lens": "lens",
    "fit/oracle": "oracle",
    "fit/concepts": "probe",
    "fit/jacobian-lens": "lens",
}
"""What a fit makes, where it is not a vector."""


@pytest.fixture(scope="module")
def tiny() -> Iterator[TransformersEngine]:
    model = byte_model(
        hidden_size=16,
        intermediate_size=32,
        num_attention_heads=2,
        max_position_embeddings=256,
    )
    with TransformersEngine(model, ByteTokenizer(), name="tiny") as running:
        yield running


@pytest.fixture
async def running(
    tiny: TransformersEngine, registry: Registry, settings: ServerSettings
) -> AsyncIterator[httpx.AsyncClient]:
    """A client of a server with gradients, whose jobs run."""
    rows = {1: torch.randn(16, generator=torch.Generator().manual_seed(5))}
    registry.add("glad", ControlVector.of(rows, model="tiny"))
    async for client in served(create_app(tiny, registry, settings)):
        yield client


async def served(app: FastAPI) -> AsyncIterator[httpx.AsyncClient]:
    transport = httpx.ASGITransport(app, raise_app_exceptions=False)
    app.state.steer.jobs.start()
    async with httpx.AsyncClient(transport=transport, base_url="http://localhost") as client:
        yield client
    await asyncio.to_thread(app.state.steer.jobs.stop, LIVENESS_SECONDS)


async def done(client: httpx.AsyncClient, route: str, body: dict[str, Any]) -> dict[str, Any]:
    """The job that the route answers with, at its end."""
    response = await client.post(f"/v1/steering/{route}", json=body)
    assert response.status_code == 202, response.text
    job = response.json()
    assert (await client.get(f"/v1/jobs/{job['id']}/events")).is_success
    return (await client.get(f"/v1/jobs/{job['id']}")).json()


def made(job: dict[str, Any]) -> list[dict[str, Any]]:
    result = job["result"]
    return result.get("artefacts", [result])


@pytest.mark.parametrize("route", BODIES)
async def test_a_fit_is_a_job(running: httpx.AsyncClient, registry: Registry, route: str) -> None:
    fields, field, items = BODIES[route]
    job = await done(running, route, {**fields, field: items})
    assert job["state"] == "succeeded", job
    assert job["kind"] == route
    assert job["request"][field] == len(items)
    assert job["progress"]["done"] == job["progress"]["total"] > 0
    kind = KINDS.get(route, "vector")
    for one in made(job):
        assert registry.entry(kind, one[kind]).sha256 == one["sha256"]
        assert one["created"]
        assert one["name"].startswith(fields["name"])


async def test_a_fit_notes_the_cosines_to_what_is_registered(
    running: httpx.AsyncClient, registry: Registry
) -> None:
    body = {"name": "happy", "pairs": PAIRS, "beside": True, "layers": [1]}
    job = await done(running, "fit", body)
    assert job["state"] == "succeeded", job
    noted = registry.vector("happy").card.provenance["cosines"]
    own = registry.vector("happy").cosine(registry.vector("glad"))[1]
    # Neither those of other widths nor those without the layer are comparable.
    assert noted == {"glad": {"1": pytest.approx(own, abs=1e-4)}}


def test_a_model_served_under_another_name_keeps_what_was_made_for_it(registry: Registry) -> None:
    served = FakeEngine(fake_model(name="org/tiny"))
    served.info = served.info.served_as("prod")
    rows = {1: torch.ones(16)}
    for name, made_for in (("own", "tiny"), ("under", "prod"), ("far", "other"), ("any", None)):
        registry.add(name, ControlVector.of(rows, model=made_for))
    known = set(RegisteredVectors(registry.for_model(served.info)))
    assert known & {"own", "under", "far", "any"} == {"own", "under", "any"}

    def checked(source: str) -> None:
        fields = {"vector": "own", "from": source, "prompts": ["a", "b"]}
        TransferRequest.model_validate(fields).check(served, registry, ["a", "b"])

    checked("tiny")
    checked("prod")
    with pytest.raises(Unsupported, match="'prod'") as caught:
        checked("other")
    assert caught.value.code == "no_second_model"


async def test_a_tokens_direction_is_kept_as_a_vector(
    running: httpx.AsyncClient, registry: Registry, tiny: TransformersEngine
) -> None:
    job = await done(running, "fit/token", {"name": "letter", "token": "a"})
    assert job["state"] == "succeeded", job
    kept = registry.vector("letter")
    assert kept.card.layers == (0, 1, 2)
    assert kept.card.default_layers == (1,)
    number = tiny.tokenizer.encode("a", add_special_tokens=False)[0]
    assert kept.card.provenance["token"] == number
    row = tiny.token_rows([number])[0]
    assert torch.allclose(kept[1], row / row.norm(), atol=1e-6)
    items = [
        {"kind": "ablate", "vector": one, "layers": [1]} for one in ("letter", {"token": number})
    ]
    for item in items:
        asked = {"model": "tiny", "prompt": "abc", "max_tokens": 3, "temperature": 0}
        answer = await running.post(
            "/v1/completions", json={**asked, "steering": {"interventions": [item]}}
        )
        assert answer.status_code == 200, answer.text


async def test_a_lens_is_fitted_and_read_through(
    registry: Registry, settings: ServerSettings
) -> None:
    """The closed form alone, which asks an engine for no derivatives."""
    async for client in served(create_app(FakeEngine(fake_model()), registry, settings)):
        job = await done(client, "fit/tuned-lens", FAKE["fit/tuned-lens"])
        assert job["state"] == "succeeded", job
        assert all(one["tuned"] <= one["plain"] for one in job["result"]["kl"].values())
        body = {"text": "Paris", "lens": "x", "positions": [-1]}
        read = (await client.post("/v1/inspect/logit-lens", json=body)).json()
    assert read["lens"].startswith("x@")


async def test_a_lens_of_one_layer_reads_that_layer(
    running: httpx.AsyncClient, registry: Registry
) -> None:
    fields, field, items = BODIES["fit/jacobian-lens"]
    body = {**fields, field: items, "name": "one", "layers": [1]}
    for layers, code in (([2], "invalid_option"), ([1, 9], "layer_out_of_range")):
        refused = await running.post(
            "/v1/steering/fit/jacobian-lens", json={**body, "layers": layers}
        )
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == (code, f"/layers/{len(layers) - 1}")
    job = await done(running, "fit/jacobian-lens", body)
    assert job["state"] == "succeeded", job
    assert list(job["result"]["kl"]) == ["2"]
    assert registry.lens("one").output_layers == [1]
    asked = {"text": "Paris", "lens": "one", "positions": [-1]}
    read = (await running.post("/v1/inspect/logit-lens", json=asked)).json()
    assert read["layers"] == [1, 2]
    refused = await running.post("/v1/inspect/logit-lens", json={**asked, "layers": [0]})
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("layer_not_in_lens", "/layers")
    token = {"kind": "add", "strength": 1, "vector": {"token": "a", "lens": "one"}}
    for layer, status in ((1, 200), (0, 400)):
        spec = {"interventions": [{**token, "layers": [layer]}]}
        answer = await running.post(
            "/v1/completions",
            json={"model": "tiny", "prompt": "ab", "max_tokens": 2, "steering": spec},
        )
        assert answer.status_code == status, answer.text
    assert answer.json()["error"]["param"].startswith("/steering/interventions/0/")
    assert "it has layers [1, 2]" in answer.json()["error"]["message"]


async def test_a_probe_is_fitted_listed_and_read_with(running: httpx.AsyncClient) -> None:
    fields, field, items = BODIES["fit/concepts"]
    job = await done(running, "fit/concepts", {**fields, field: items})
    assert job["state"] == "succeeded", job
    measured = job["result"]["probe_form"]["measures"]
    assert (measured["trained"], measured["held_out"]) == (10, 2)
    assert {one["role"] for one in measured["roles"]} == {"colour", "shape"}
    listed = (await running.get("/v1/steering/probes")).json()["data"]
    assert [one["name"] for one in listed] == ["said"]
    body = {"probe": "said", "prompts": [{"text": "a red ball"}]}
    found = (await running.post("/v1/inspect/concepts", json=body)).json()
    assert found["probe"].startswith("said@")
    assert found["layers"] == [1]
    assert [one["role"] for one in found["readings"][0]["roles"]] == ["colour", "shape"]
    content = await running.get("/v1/steering/probes/said/content")
    assert hashlib.sha256(content.content).hexdigest() == job["result"]["sha256"]
    refused = await running.post("/v1/inspect/concepts", json={**body, "seed": 1})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "/seed")
    unknown = await running.post("/v1/inspect/concepts", json={**body, "probe": "nobody"})
    error = unknown.json()["error"]
    assert (error["code"], error["param"]) == ("unknown_probe", "/probe")
    one = [{**item, "pairs": {"colour": "red"}} for item in items]
    refused = await running.post("/v1/steering/fit/concepts", json={**fields, field: one})
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("one_filler", "/examples")


async def test_two_prompts_are_a_job(running: httpx.AsyncClient) -> None:
    body = {"name": "toward", "toward": "a happy day", "away": [{"role": "user", "content": "x"}]}
    refused = await running.post("/v1/steering/fit/prompts", json=body)
    assert refused.status_code == 202  # a model without a template shows only while it runs
    job = await done(running, "fit/prompts", {**body, "away": "a sad day"})
    assert job["state"] == "succeeded", job
    assert job["result"]["layers"] == [0, 1, 2]


async def test_relations_that_the_model_does_not_know_say_so(running: httpx.AsyncClient) -> None:
    job = await done(running, "fit/lrc", {**LRC, "facts": FACTS})
    assert (job["state"], job["error"]["code"]) == ("failed", "not_known")


async def test_relations_that_the_model_knows_become_concepts(
    registry: Registry, settings: ServerSettings
) -> None:
    known = {"France": "Europe", "Italy": "Europe", "Kenya": "Africa", "Ghana": "Africa"}
    body = {
        "name": "in",
        "relation": "continent",
        "prompt": "Where is {subject}?",
        "opening": "It is in",
        "subject_layer": 0,
        "site": "resid_pre",
        "jacobians": 2,
        "facts": [{"subject": s, "relation": "continent", "object": o} for s, o in known.items()],
    }
    with running_engine(DEMO_MODEL) as demo:
        async for client in served(create_app(demo, registry, settings)):
            job = await done(client, "fit/lrc", body)
    assert job["state"] == "succeeded", job
    assert [one["name"] for one in job["result"]["artefacts"]] == ["in-Africa", "in-Europe"]
    assert job["progress"]["done"] == job["progress"]["total"] == 6
    assert "4 of 4 facts" in job["result"]["notes"][0]


def option(name: str, value: Any) -> list[str]:
    text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
    text = json.dumps(value) if isinstance(value, dict) else text
    return [f"--{name.replace('_', '-')}", text]


@pytest.mark.parametrize("route", BODIES)
async def test_a_command_makes_what_its_job_makes(
    running: httpx.AsyncClient,
    registry: Registry,
    tiny: TransformersEngine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    route: str,
) -> None:
    """The same request, the same content: one model of the parameters, one function."""
    monkeypatch.setattr(commands, "running_engine", lambda *_, **__: nullcontext(tiny))
    fields, _, items = BODIES[route]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps(item) + "\n" for item in items))
    moves = route == "fit/transfer"
    given = ["glad", "--prompts", str(data)] if moves else [str(data)]
    for name, value in fields.items():
        given += [] if moves and name == "vector" else option(name, value)
    place = tmp_path / "commands"
    with Registry.open(place) as other:
        other.add("glad", registry.vector("glad"))
    command = route.partition("/")[2] or "pairs"
    arguments = ["fit", command, *given, "--register", "--registry", str(place)]
    shown = await asyncio.to_thread(CliRunner().invoke, command_line, arguments)
    assert shown.exit_code == 0, shown.output
    job = await done(running, route, {**fields, "data": data.read_text()})
    with Registry.open(place) as other:
        for one in made(job):
            kind = KINDS.get(route, "vector")
            assert other.entry(kind, one["name"]).sha256 == one["sha256"]


FAKE = {
    "fit/labels": {"name": "x", "texts": TEXTS},
    "fit/detector": {"name": "x", "texts": MOODS},
    "fit/lrc": {**LRC, "facts": FACTS},
    "fit/low-rank": {"name": "x", "layers": [1], "exercises": EXERCISES},
    "fit/snmf": {"name": "x", "layer": 1, "prompts": ASKS},
    "fit/nmf": {"name": "x", "layer": 1, "prompts": ASKS},
    "fit/prompts": {"name": "x", "toward": "a", "away": "b"},
    "fit/tuned-lens": {"name": "x", "prompts": ASKS, "steps": 0},
    "fit/jacobian-lens": {"name": "x", "prompts": ASKS},
    "fit/token": {"name": "x", "token": "a"},
    "fit/transfer": {"vector": "joy", "from": "fake-model", "prompts": ASKS},
    "fit/alphasteer": {"name": "x", "vector": "joy", "steer": "joy", "texts": TEXTS},
    "fit/reps": {"name": "x", "layers": [1], "preferences": LIKED},
    "fit/prosv": {"name": "x", "layers": [1], "preferences": LIKED},
    "fit/psr": {"name": "x", "instruction": "a", "layers": [1], "preferences": LIKED},
    "fit/oracle": {"name": "x", "questions": QUESTIONS, **PLACED},
    "fit/act": {"name": "x", "layers": [1], "pairs": PAIRS},
    "fit/conceptor": {"name": "x", "layers": [1], "prompts": ASKS},
    "fit/angular": {"name": "x", "pairs": PAIRS},
}


@pytest.mark.parametrize(
    ("route", "changed", "param", "code"),
    [
        ("fit/labels", {"texts": None}, None, "invalid_value"),
        ("fit/labels", {"data": "no json", "texts": None}, "/data", "invalid_labels"),
        ("fit/labels", {"texts": [{"text": "a"}, TEXTS[0]]}, "/texts/0/label", "missing_field"),
        ("fit/labels", {"only": ["nobody"]}, "/only", "unknown_label"),
        ("fit/labels", {"texts": TEXTS[::3]}, "/texts", "unknown_label"),
        ("fit/labels", {"method": "pca"}, "/method", "invalid_value"),
        ("fit/labels", {"layers": [0, 9]}, "/layers/1", "layer_out_of_range"),
        ("fit/labels", {"batch": 4}, "/batch", "unknown_field"),
        ("fit/detector", {"texts": TEXTS}, "/texts", "invalid_labels"),
        ("fit/detector", {"texts": MOODS[:8]}, "/texts", "too_few_texts"),
        ("fit/detector", {"threshold": "conformal"}, "/rate", "too_few_safe_texts"),
        ("fit/detector", {"rate": 1.0}, "/rate", "invalid_value"),
        ("fit/prompts", {"toward": ""}, "/toward", "invalid_value"),
        ("fit/prompts", {"positions": "first"}, "/positions", "invalid_value"),
        ("fit/prompts", {"positions": {"roles": ["poet"]}}, "/positions/roles/0", "invalid_value"),
        ("fit/prompts", {"positions": {"after": []}}, "/positions/after", "invalid_value"),
        ("fit/labels", {"positions": {"tokens": ["ab"]}}, "/positions/tokens/0", "not_one_token"),
        ("fit/conceptor", {"tokens": {"tokens": ["ab"]}}, "/tokens/tokens/0", "not_one_token"),
        ("fit/prompts", {"site": "attic"}, "/site", "invalid_value"),
        ("fit/snmf", {"layer": 77}, "/layer", "layer_out_of_range"),
        ("fit/snmf", {"keep": 2}, "/keep", "invalid_value"),
        ("fit/snmf", {"prompts": []}, "/prompts", "invalid_value"),
        ("fit/nmf", {"components": 0}, "/components", "invalid_value"),
        ("fit/nmf", {"sample": 1_000_000, "components": 4096}, "/sample", "too_large"),
        ("fit/nmf", {"penalty": -1}, "/penalty", "invalid_value"),
        ("fit/nmf", {"data": "3", "prompts": None}, "/data", "invalid_pairs"),
        ("fit/low-rank", {"rate": 0}, "/rate", "invalid_value"),
        ("fit/low-rank", {}, None, "no_gradients"),
        ("fit/lrc", {}, None, "no_gradients"),
        ("fit/lrc", {"relation": None}, "/relation", "invalid_value"),
        ("fit/tuned-lens", {"steps": 1}, "/steps", "no_gradients"),
        ("fit/tuned-lens", {"prompts": ASKS[:7]}, "/prompts", "no_prompts"),
        ("fit/tuned-lens", {"data": '"a"\n', "prompts": None}, "/data", "no_prompts"),
        ("fit/tuned-lens", {"rows": 257}, "/rows", "too_large"),
        ("fit/tuned-lens", {"held_out": 0.95}, "/held_out", "invalid_value"),
        ("fit/token", {"token": "ab"}, "/token", "not_one_token"),
        ("fit/token", {"token": None}, None, "invalid_value"),
        ("fit/token", {"token_id": 4}, None, "invalid_value"),
        ("fit/token", {"token": None, "token_id": 99_999}, "/token_id", "unknown_token"),
        ("fit/token", {"lens": "nobody"}, "/lens", "unknown_lens"),
        ("fit/token", {"layers": [99]}, "/layers/0", "layer_out_of_range"),
        ("fit/jacobian-lens", {}, None, "no_gradients"),
        ("fit/jacobian-lens", {"average": 0}, "/average", "invalid_value"),
        ("fit/jacobian-lens", {"prompts": []}, "/prompts", "invalid_value"),
        ("fit/transfer", {"from": "another"}, "/from", "no_second_model"),
        ("fit/transfer", {"vector": "joi"}, "/vector", "unknown_vector"),
        ("fit/transfer", {"held_out": 0.95}, "/held_out", "invalid_value"),
        ("fit/alphasteer", {"steer": "fear"}, "/steer", "unknown_label"),
        ("fit/alphasteer", {"vector": "joi"}, "/vector", "unknown_vector"),
        ("fit/alphasteer", {"null_share": [1.5]}, "/null_share/0", "invalid_value"),
        ("fit/alphasteer", {"penalty": [1.0, 2.0, 3.0]}, "/penalty", "invalid_option"),
        ("fit/alphasteer", {"layers": [9]}, "/layers", "layer_not_in_vector"),
        ("fit/reps", {}, None, "no_gradients"),
        ("fit/prosv", {"spread": 0.0}, "/spread", "invalid_value"),
        ("fit/oracle", {}, None, "no_gradients"),
        ("fit/oracle", {"questions": []}, "/questions", "invalid_value"),
        ("fit/oracle", {"questions": [{"prompt": "a"}]}, "/questions/0/question", "missing_field"),
        ("fit/oracle", {"rank": 513}, "/rank", "invalid_value"),
        ("fit/oracle", {"oracle_form": "tarot"}, "/oracle_form", "invalid_value"),
        ("fit/psr", {"instruction": None}, "/instruction", "invalid_value"),
        ("fit/psr", {"layers": [1, 77]}, "/layers/1", "layer_out_of_range"),
        ("fit/act", {"transport": "cubic"}, "/transport", "invalid_value"),
        ("fit/conceptor", {"rank": 999}, "/rank", "invalid_option"),
        ("fit/conceptor", {"max_error": 1.0}, "/max_error", "invalid_value"),
        ("fit/angular", {"pairs": PAIRS[:1]}, "/pairs", "invalid_value"),
    ],
)
async def test_what_is_wrong_is_said_at_its_field(
    http: httpx.AsyncClient, route: str, changed: dict[str, Any], param: str | None, code: str
) -> None:
    body: dict[str, Any] = {**FAKE[route], **changed}
    for name in ("texts", "prompts"):
        if name in body and body[name] is None:
            del body[name]
    error = (await http.post(f"/v1/steering/{route}", json=body)).json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert (await http.get("/v1/jobs")).json()["data"] == []


@pytest.mark.parametrize(
    ("route", "changed", "param", "code"),
    [
        ("fit/low-rank", {"rank": 99}, "/rank", "invalid_option"),
        ("fit/low-rank", {"batch": 65}, "/batch", "too_large"),
        ("fit/low-rank", {"layers": [1, 8]}, "/layers/1", "layer_out_of_range"),
        ("fit/reps", {"preferences": ONE_SIDED}, "/instruction", "no_answers"),
        ("fit/reps", {"batch": 33}, "/batch", "too_large"),
        ("fit/prosv", {"first": 0, "last": 0}, "/last", "invalid_option"),
        ("fit/oracle", {"rank": 17}, "/rank", "invalid_option"),
        ("fit/oracle", {"batch": 65}, "/batch", "too_large"),
        ("fit/oracle", {"site": "mlp_out"}, "/site", "unsupported_site"),
        ("fit/oracle", {"layers": [0, 7]}, "/layers/1", "layer_out_of_range"),
        (
            "fit/oracle",
            {"oracle_form": {"message": "{states}{question}", "placeholder": "#", "layer": 9}},
            "/oracle_form",
            "layer_out_of_range",
        ),
        ("fit/oracle", {"oracle_form": "selfie"}, "/oracle_form", "placeholder_not_one_token"),
        (
            "fit/oracle",
            {"questions": [QUESTIONS[0], {**QUESTIONS[1], "question": "#"}]},
            "/questions/1/question",
            "ambiguous_placeholder",
        ),
        ("fit/lrc", {"relation": "none"}, "/relation", "unknown_relation"),
        ("fit/lrc", {"prompt": "Where?"}, "/prompt", "invalid_template"),
        ("fit/lrc", {"object_layer": 9}, "/object_layer", "layer_out_of_range"),
    ],
)
async def test_so_it_is_with_gradients(
    running: httpx.AsyncClient, route: str, changed: dict[str, Any], param: str, code: str
) -> None:
    body = {**FAKE[route], **changed}
    error = (await running.post(f"/v1/steering/{route}", json=body)).json()["error"]
    assert (error["code"], error["param"]) == (code, param), error


async def test_a_trained_oracle_is_asked_in_the_same_server(
    running: httpx.AsyncClient, registry: Registry
) -> None:
    body = {"name": "sibyl", "questions": QUESTIONS, "steps": 40, "batch": 8, "rate": 0.02}
    job = await done(running, "fit/oracle", {**body, **PLACED, "layers": [1, 2]})
    assert job["state"] == "succeeded", job
    right = job["result"]["right"]
    assert set(right) == {"oracle", "shuffled", "text", "untrained", "commonest"}
    listed = (await running.get("/v1/steering/oracles")).json()["data"]
    assert [one["name"] for one in listed] == ["sibyl"]
    asked = {"source": {"text": "a sad day 3"}, "questions": ["Glad"], "max_tokens": 1}
    found = (await running.post("/v1/inspect/ask", json={**asked, "oracle": "sibyl"})).json()
    assert (found["oracle"], found["trained"], found["layers"]) == ("sibyl", True, [1, 2])
    plain = (await running.post("/v1/inspect/ask", json={**asked, **_form()})).json()
    assert not plain["trained"]
    said = [[cell["probability"] for cell in one["cells"]] for one in (found, plain)]
    assert said[0] != said[1]


def _form() -> dict[str, Any]:
    return {"form": PLACED["oracle_form"], "layers": [1, 2]}


async def test_training_can_be_cancelled(running: httpx.AsyncClient, registry: Registry) -> None:
    body = {**FAKE["fit/low-rank"], "steps": 100_000}
    job = (await running.post("/v1/steering/fit/low-rank", json=body)).json()
    state = lambda: registry.jobs.get(job["id"]).state  # noqa: E731
    assert await asyncio.to_thread(eventually, state, lambda now: now != "queued") == "running"
    assert (await running.post(f"/v1/jobs/{job['id']}/cancel")).is_success
    assert (await running.get(f"/v1/jobs/{job['id']}/events")).is_success
    assert (await running.get(f"/v1/jobs/{job['id']}")).json()["state"] == "cancelled"


FUNCTIONS: dict[type[FitRequest], Any] = {
    PairsRequest: fit,
    LabelsRequest: fit_labels,
    DetectorRequest: fit_detector,
    TwoPromptsRequest: fit_two_prompts,
    LrcRequest: fit_lrc,
    LowRankRequest: fit_low_rank,
    SnmfRequest: fit_snmf,
    NmfRequest: fit_nmf,
    TransferRequest: transfer,
    TunedLensRequest: fit_tuned_lens,
    JacobianLensRequest: fit_jacobian_lens,
    TokenRequest: fit_token,
    AlphaSteerRequest: fit_alphasteer,
    RepsRequest: fit_reps,
    ProsvRequest: fit_prosv,
    OracleRequest: fit_oracle,
    ConceptsFitRequest: fit_concepts,
    PsrRequest: fit_psr,
    ActRequest: fit_act,
    ConceptorRequest: fit_conceptor,
    AngularRequest: fit_angular,
}


@pytest.mark.parametrize("request_type", FIT_REQUESTS)
def test_a_function_and_its_request_have_the_same_defaults(request_type: type[FitRequest]) -> None:
    signature = inspect.signature(FUNCTIONS[request_type]).parameters
    # What has one name and is another thing: the data, and vectors where a request says whether.
    form = request_type.form
    others = {"name", "beside", *(() if form is None else (form.field,))}
    shared = (set(signature) & set(request_type.model_fields)) - others
    assert shared
    for name in shared:
        field = request_type.model_fields[name]
        if not field.is_required():
            assert signature[name].default == field.default, name
    if request_type.batch_size is not None:
        assert signature["batch"].default == request_type.batch_size


@pytest.mark.parametrize(
    ("request_type", "function"), [(CalibrateRequest, calibrate), (EvaluateRequest, evaluate)]
)
def test_so_have_those_that_measure(request_type: type[MeasureRequest], function: Any) -> None:
    signature = inspect.signature(function).parameters
    for name in set(signature) & set(request_type.model_fields):
        field = request_type.model_fields[name]
        if not field.is_required():
            assert signature[name].default == field.default, name


@pytest.mark.parametrize("request_type", [*FIT_REQUESTS, StatesRequest, TrustRequest])
def test_items_in_the_place_of_their_text_are_told_their_field(request_type: type[Any]) -> None:
    form = getattr(request_type, "form", None)
    if "data" not in request_type.model_fields:
        assert form is None
        return
    items = {StatesRequest: "prompts", TrustRequest: "texts"}.get(request_type)
    items = items or getattr(form, "field", None)
    with pytest.raises(ValidationError) as found:
        request_type.model_validate({"data": [{"text": "a"}]})
    [told] = [one["msg"] for one in found.value.errors() if one["loc"] == ("data",)]
    assert f"in {items!r}" in told


@pytest.mark.parametrize(
    ("given", "kept"),
    [(True, "true"), (0, "0"), (1, "1"), (1.0, "1"), ("yes", "yes"), ("1", "1")],
)
def test_labels_are_read_as_in_a_file(given: Any, kept: str) -> None:
    line = json.dumps({"text": "a", "label": given})
    assert LabelledParam.model_validate_json(line).label == kept
    [item] = parse_labelled(line.encode(), "lines").items
    assert item.label == kept


def test_every_method_is_described() -> None:
    assert set(FUNCTIONS) == set(FIT_REQUESTS)
    assert set(METHODS) == set(get_args(PairsRequest.model_fields["method"].annotation))
    assert set(UNPAIRED) == set(get_args(LabelsRequest.model_fields["method"].annotation))
    assert set(MAPS) == set(get_args(TransferRequest.model_fields["method"].annotation))
    for request in FIT_REQUESTS:
        for name, field in request.model_fields.items():
            data = request.form is not None and name == request.form.field
            assert field.description or data, (request, name)
