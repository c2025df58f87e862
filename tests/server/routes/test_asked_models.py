"""Models that a server asks for its clients: an embedder and a labeller, named by its operator."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
import pytest
from artefacts import EXAMPLES
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS
from pydantic import SecretStr
from stub_model import StubModel, stub_model

from steer.engines.fake.engine import FakeEngine
from steer.fit.requests.features.labels import LabelRequest
from steer.jobs.kinds.asked import labels_kind
from steer.jobs.kinds.kind import JobContext
from steer.jobs.signals import RunnerStopping
from steer.registry.registry import Registry
from steer_server.settings import ServerSettings

FEATURES = "/v1/steering/saes/features/features"
TEXTS = [f"{word} number {n}" for n in range(8) for word in ("fish", "bird")]
MEANINGS = {
    "French words": [1.0, 0.0],
    "French cities": [0.8, 0.6],
    "food": [0.0, 1.0],
    "something to eat": [0.1, 2.0],
    "Gallic": [0.6, 0.8],
    "label": [1.0, 1.0],
}
SECRETS = ("embedder-key", "labeller-key", "127.0.0.1")


@pytest.fixture
def model() -> Iterator[StubModel]:
    with stub_model() as one:
        one.embed = lambda text: MEANINGS[text]
        yield one


@pytest.fixture
def settings(settings: ServerSettings, model: StubModel) -> ServerSettings:
    return settings.model_copy(
        update={
            "embedder": model.place,
            "embedder_key": SecretStr("embedder-key"),
            "labeller": model.place,
            "labeller_key": SecretStr("labeller-key"),
            "labeller_questions": 8,
        }
    )


@pytest.fixture(autouse=True)
def _jobs_run(app: FastAPI) -> Iterator[None]:
    app.state.steer.jobs.start()
    yield
    app.state.steer.jobs.stop(LIVENESS_SECONDS)


async def worked(http: httpx.AsyncClient, kind: str, **body: Any) -> dict[str, Any]:
    """The job that was asked for, when it has ended; nothing in it tells a secret."""
    asked = await http.post(f"/v1/steering/sae/{kind}", json={"sae": "features", **body})
    assert asked.status_code == 202, asked.text
    place = asked.headers["location"]
    events = await http.get(f"{place}/events")
    found = await http.get(place)
    assert not any(one in text for one in SECRETS for text in (events.text, found.text))
    return found.json()


async def by_meaning(http: httpx.AsyncClient, query: str) -> httpx.Response:
    return await http.get(FEATURES, params={"q": query, "mode": "meaning"})


async def test_features_are_found_by_what_their_labels_mean(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    early = await by_meaning(http, "something to eat")
    assert (early.status_code, early.json()["error"]["code"]) == (400, "not_embedded")
    job = await worked(http, "embeddings")
    assert job["state"] == "succeeded", job
    assert job["progress"]["done"] == job["progress"]["total"] == 3
    told = {"embedder": "stub", "width": 2, "labels": 3, "embedded": 3, "calls": 2}
    assert job["result"] == {"sae": "features", **told}
    found = (await by_meaning(http, "something to eat")).json()
    assert (found["mode"], found["unread"]) == ("meaning", 0)
    assert [one["feature"] for one in found["data"]] == [6, 5, 1]
    assert [one["score"] for one in found["data"]] == pytest.approx(
        [2 / 4.01**0.5, 1.28 / 4.01**0.5, 0.1 / 4.01**0.5], abs=1e-3
    )
    assert found["data"][0]["label"]["text"] == "food"
    one = await http.get(FEATURES, params={"q": "food", "mode": "meaning", "limit": 1})
    assert [x["feature"] for x in one.json()["data"]] == [6]


async def test_only_a_changed_label_is_embedded_anew(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    await worked(http, "embeddings")
    await http.put("/v1/steering/saes/features/labels/mine", json={"labels": {"1": "Gallic"}})
    found = (await by_meaning(http, "food")).json()
    assert found["unread"] == 1
    assert [one["feature"] for one in found["data"]] == [6, 5]
    model.embedded.clear()
    job = await worked(http, "embeddings")
    assert job["result"]["embedded"] == 1
    assert model.embedded == ["label", "Gallic"]
    found = (await by_meaning(http, "food")).json()
    assert [one["feature"] for one in found["data"]] == [6, 1, 5]


async def test_an_embedder_that_fails_leaves_the_search_for_words_alone(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    await worked(http, "embeddings")
    model.embedded.clear()
    model.embed = lambda text: 401
    refused = await by_meaning(http, "food")
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "embedder_failed")
    assert not any(one in refused.text for one in SECRETS)
    asked = len(model.embedded)
    found = (await http.get(FEATURES, params={"q": "food"})).json()
    assert [one["feature"] for one in found["data"]] == [6]
    assert (found["mode"], len(model.embedded)) == ("text", asked)
    job = await worked(http, "embeddings")
    assert (job["state"], job["error"]["code"]) == ("failed", "embedder_failed")


@pytest.mark.parametrize("params", [{}, {"q": ""}, {"q": "  "}])
async def test_nothing_means_nothing(http: httpx.AsyncClient, params: dict[str, str]) -> None:
    refused = await http.get(FEATURES, params={"mode": "meaning", **params})
    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "invalid_value")


async def test_an_sae_without_labels_has_nothing_to_embed(
    http: httpx.AsyncClient, registry: Registry
) -> None:
    bare = EXAMPLES["sae"]()
    assert not bare.labels
    registry.add("bare", bare)
    refused = await http.post("/v1/steering/sae/embeddings", json={"sae": "bare"})
    assert refused.json()["error"]["code"] == "no_labels"


async def test_a_labellers_labels_come_with_their_price(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    await worked(http, "survey", prompts=TEXTS)
    model.reply = lambda question: "names of animals"
    job = await worked(http, "labels", ask_labeller=True)
    assert job["state"] == "succeeded", job
    assert job["progress"]["done"] == job["progress"]["total"] == 8
    calls = job["result"]["asked"]["calls"]
    assert calls == len(model.asked) == job["result"]["labels"] > 0
    assert job["result"]["asked"] == {
        "calls": calls,
        "prompt_tokens": 7 * calls,
        "completion_tokens": 2 * calls,
    }
    assert (job["result"]["source"], job["result"]["kind"]) == ("labeller", "labeller")
    shown = (await http.get(f"{FEATURES}/1")).json()
    if not shown["statistics"]["dead"]:
        assert "names of animals" in [one["text"] for one in shown["labels"]]
    assert model.keys == {"Bearer labeller-key"}


async def test_a_labeller_judges_labels_in_a_job(http: httpx.AsyncClient, model: StubModel) -> None:
    await worked(http, "survey", prompts=TEXTS)
    model.reply = lambda question: "1, 2"
    job = await worked(
        http, "score", features=[1, 5], nulls=2, prompts=TEXTS[:2], ask_labeller=True
    )
    assert job["state"] == "succeeded", job
    assert job["progress"]["done"] == job["progress"]["total"] == (2 + 4) * (1 + 2) + 2 * 4
    assert job["result"]["asked"]["calls"] == len(model.asked)
    scored = [one for one in job["result"]["features"] if one.get("detection")]
    assert bool(scored) == bool(model.asked)
    for one in scored:
        assert one["detection"]["asked"] > 0


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("labels", {"features": [*range(8), 0]}),
        ("score", {"features": [1, 5, 6]}),
    ],
)
async def test_more_questions_than_are_allowed_are_refused_at_once(
    http: httpx.AsyncClient, model: StubModel, kind: str, body: dict[str, Any]
) -> None:
    await worked(http, "survey", prompts=TEXTS)
    asked = {"sae": "features", "ask_labeller": True, **body}
    refused = await http.post(f"/v1/steering/sae/{kind}", json=asked)
    error = refused.json()["error"]
    assert refused.status_code == 413, refused.text
    assert (error["code"], error["param"]) == ("too_many_questions", "/features")
    assert model.asked == []


async def test_a_labeller_that_fails_ends_its_job_and_tells_no_secret(
    http: httpx.AsyncClient, model: StubModel
) -> None:
    await worked(http, "survey", prompts=TEXTS)
    model.reply = lambda question: 401
    job = await worked(http, "labels", ask_labeller=True)
    assert (job["state"], job["error"]["code"]) == ("failed", "labeller_failed")
    plain = await worked(http, "labels")
    assert plain["state"] == "succeeded"


async def test_an_attempt_goes_on_where_the_last_one_stopped(
    http: httpx.AsyncClient,
    model: StubModel,
    registry: Registry,
    engine: FakeEngine,
    settings: ServerSettings,
    tmp_path: Path,
) -> None:
    await worked(http, "survey", prompts=TEXTS)
    labeller = settings.asked_labeller
    assert labeller is not None
    kind = labels_kind(replace(labeller, parallel=1))
    model.reply = lambda question: "names of animals"

    def stops(done: int, total: int | None = None, note: str = "") -> None:
        if done == 2:
            raise RunnerStopping

    def attempt(progress: Any) -> dict[str, Any]:
        answers = tmp_path / "answers"
        context = JobContext(engine, registry, tmp_path, tmp_path, progress, answers)
        return kind.run(context, LabelRequest(sae="features", ask_labeller=True))

    with pytest.raises(RunnerStopping):
        attempt(stops)
    first = list(model.asked)
    assert len(first) >= 2
    told = attempt(lambda *_: None)
    assert len(set(model.asked)) == len(model.asked) == told["labels"]
    assert told["asked"]["calls"] == len(model.asked) - len(first)


async def test_without_a_model_each_is_refused_by_name(
    http: httpx.AsyncClient, app: FastAPI, registry: Registry, engine: FakeEngine, in_process: Any
) -> None:
    from steer_server.app import create_app

    await worked(http, "survey", prompts=TEXTS)
    plain = create_app(engine, registry, ServerSettings(port=0))
    async with in_process(plain) as other:
        for path, body, code in (
            ("embeddings", {}, "no_embedder"),
            ("labels", {"ask_labeller": True}, "no_labeller"),
            ("score", {"features": [1], "ask_labeller": True}, "no_labeller"),
        ):
            refused = await other.post(f"/v1/steering/sae/{path}", json={"sae": "features", **body})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, code)
        assert (await by_meaning(other, "x")).json()["error"]["code"] == "no_embedder"
        assert (await other.get(FEATURES, params={"q": "food"})).status_code == 200


async def test_no_client_names_a_url(http: httpx.AsyncClient, model: StubModel) -> None:
    for field in ("labeller", "embedder", "url"):
        body = {"sae": "features", "features": [1], field: "http://10.0.0.1/v1#model=m"}
        for kind in ("labels", "score", "embeddings"):
            refused = await http.post(f"/v1/steering/sae/{kind}", json=body)
            assert refused.status_code == 400, refused.text
    assert json.dumps(model.asked) == "[]"
