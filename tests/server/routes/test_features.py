"""The features of an SAE over HTTP: surveyed and contrasted in jobs, and shown."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import torch
from artefacts import random_sae
from fastapi import FastAPI
from liveness import LIVENESS_SECONDS

from steer.artefacts.detector import Detector
from steer.artefacts.sae.labels import FeatureLabel
from steer.registry.registry import Registry

FEATURES = "/v1/steering/saes/features/features"
TEXTS = [f"{word} number {n}" for n in range(8) for word in ("fish", "bird")]


@pytest.fixture(autouse=True)
def _jobs_run(app: FastAPI) -> Iterator[None]:
    app.state.steer.jobs.start()
    yield
    app.state.steer.jobs.stop(LIVENESS_SECONDS)


async def worked(http: httpx.AsyncClient, path: str, body: dict[str, Any]) -> dict[str, Any]:
    """The job that was asked for, when it has ended."""
    asked = await http.post(path, json=body)
    assert asked.status_code == 202, asked.text
    place = asked.headers["location"]
    await http.get(f"{place}/events")
    return (await http.get(place)).json()


async def test_a_survey_is_shown_with_each_feature(http: httpx.AsyncClient) -> None:
    assert (await http.get(f"{FEATURES}/1")).json()["statistics"] is None
    job = await worked(http, "/v1/steering/sae/survey", {"sae": "features", "prompts": TEXTS})
    assert job["state"] == "succeeded", job
    assert job["request"] == {"sae": "features", "prompts": 16, "chat": False, "batch": 16}
    assert job["result"]["texts"] == 16
    shown = [(await http.get(f"{FEATURES}/{n}")).json() for n in range(8)]
    for one in shown:
        found = one["statistics"]
        assert (found["dead"], sum(found["histogram"])) == (found["fired"] == 0, found["fired"])
        values = [example["value"] for example in found["top"]]
        assert values == sorted(values, reverse=True)
        assert max(values, default=0.0) == found["largest"]
        for example in found["top"]:
            assert "".join(example["tokens"]) in f"<|bos|>{TEXTS[example['text']]}"
    fired = sum(one["statistics"]["fired"] for one in shown)
    assert fired > 0
    assert fired / job["result"]["tokens"] == pytest.approx(job["result"]["active_per_token"])


async def test_a_contrast_ranks_the_features(http: httpx.AsyncClient) -> None:
    body = {"sae": "features", "positive": TEXTS[::2], "negative": TEXTS[1::2], "top": 3}
    job = await worked(http, "/v1/steering/sae/contrast", body)
    assert job["state"] == "succeeded", job
    assert job["request"]["positive"] == 8
    found = job["result"]["features"]
    distances = [abs(one["auroc"] - 0.5) for one in found]
    assert distances == sorted(distances, reverse=True)
    assert len(found) <= 3


async def test_what_a_feature_causes_is_on_its_card(http: httpx.AsyncClient) -> None:
    body = {"sae": "features", "features": [1, 5], "nulls": 3, "prompts": TEXTS[:2]}
    job = await worked(http, "/v1/steering/sae/effect", body)
    assert job["state"] == "succeeded", job
    assert job["request"]["prompts"] == 2
    assert job["progress"]["done"] == job["progress"]["total"] == 2 + 2 * 3
    found = {one["feature"]: one for one in job["result"]["features"]}
    assert set(found) == {1, 5}
    assert (await http.get(f"{FEATURES}/1")).json()["effect"] == found[1]
    assert (await http.get(f"{FEATURES}/2")).json()["effect"] is None


async def test_scores_of_a_label_are_on_the_features_card(http: httpx.AsyncClient) -> None:
    await worked(http, "/v1/steering/sae/survey", {"sae": "features", "prompts": TEXTS})
    body = {"sae": "features", "features": [1, 5], "nulls": 2, "prompts": TEXTS[:2]}
    job = await worked(http, "/v1/steering/sae/score", body)
    assert job["state"] == "succeeded", job
    assert job["progress"]["done"] == job["progress"]["total"] == (2 + 4) * (1 + 2)
    found = {one["feature"]: one for one in job["result"]["features"]}
    assert {n: one["label"] for n, one in found.items()} == {1: "French words", 5: "French cities"}
    shown = (await http.get(f"{FEATURES}/5")).json()
    assert shown["scores"] == found[5]
    refused = await http.post("/v1/steering/sae/score", json={**body, "features": [1, 2]})
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == ("no_labels", "/features")


async def test_a_family_comes_with_its_clamp(http: httpx.AsyncClient) -> None:
    refused = await http.get(f"{FEATURES}/1/family")
    assert refused.json()["error"]["code"] == "no_survey"
    await worked(http, "/v1/steering/sae/survey", {"sae": "features", "prompts": TEXTS})
    for feature in range(8):
        shown = (await http.get(f"{FEATURES}/{feature}/family")).json()
        assert (shown["spec"] is None) == (shown["families"] == [])
        if shown["spec"] is not None:
            valid = await http.post("/v1/steering/validate", json={"steering": shown["spec"]})
            assert valid.json()["valid"], valid.text
    assert (await http.get(f"{FEATURES}/8/family")).json()["error"]["code"] == "unknown_feature"


async def test_a_feature_becomes_a_detector(http: httpx.AsyncClient, registry: Registry) -> None:
    sae = random_sae("jumprelu", seed=5, layer=2, labels={3: FeatureLabel(text="owls")})
    registry.add("jump", sae)
    path = "/v1/steering/saes/jump/features/3/detector"
    made = await http.post(path, json={"threshold": 9.0})
    body = made.json()
    assert (made.status_code, body["name"], body["object"]) == (201, "jump-3", "steering.detector")
    assert (body["layers"], body["card"]["detection"]["detects"]) == ([2], "owls")
    assert (await http.post(path, json={"threshold": 9.0})).status_code == 200
    wanted = Detector.of_feature(sae, 3, threshold=9.0, detects="owls")
    assert torch.equal(registry.detector("jump-3").direction, wanted.direction)
    assert (registry.detector("jump-3").bias, registry.detector("jump-3").threshold) == (
        wanted.bias,
        wanted.threshold,
    )
    named = await http.post(path, json={"name": "owl", "detects": "an owl"})
    assert (named.json()["name"], registry.detector("owl").detection.detects) == ("owl", "an owl")


@pytest.mark.parametrize(
    ("path", "body", "code", "param"),
    [
        ("jump/features/99", {}, "feature_out_of_range", None),
        ("ranked/features/3", {}, "unsupported_architecture", None),
        ("jump/features/3", {"threshold": -9.0}, "invalid_value", "/threshold"),
        ("jump/features/3", {"threshold": "9"}, "invalid_value", "/threshold"),
        ("jump/features/3", {"name": "a/b"}, "invalid_value", "/name"),
        ("jump/features/3", {"more": 1}, "unknown_field", "/more"),
        ("nobody/features/3", {}, "unknown_sae", None),
    ],
)
async def test_a_feature_that_cannot_be_a_detector(
    http: httpx.AsyncClient,
    registry: Registry,
    path: str,
    body: dict[str, Any],
    code: str,
    param: str | None,
) -> None:
    registry.add("jump", random_sae("jumprelu", seed=5, layer=2))
    registry.add("ranked", random_sae("topk", seed=5, layer=2))
    response = await http.post(f"/v1/steering/saes/{path}/detector", json=body)
    error = response.json()["error"]
    assert (error["code"], error["param"]) == (code, param), error
    assert registry.entries("detector") == []


async def test_features_are_suggested_for_a_sentence(http: httpx.AsyncClient) -> None:
    body = {
        "sae": "features",
        "instruction": "Be formal.",
        "place": "system",
        "prompts": TEXTS,
        "candidates": 3,
        "nulls": 2,
        "max_tokens": 4,
    }
    job = await worked(http, "/v1/steering/sae/suggest", body)
    assert job["state"] == "succeeded", job
    assert job["request"]["prompts"] == 16
    found = job["result"]["features"]
    gains = [one["gain"] for one in found]
    assert gains == sorted(gains, reverse=True)
    assert 0 < len(found) <= 3
    for one in found:
        valid = await http.post("/v1/steering/validate", json={"steering": one["spec"]})
        assert valid.json()["valid"], valid.text


LABELLED = [
    {"text": f"{word} number {n}", "label": word} for n in range(20) for word in ("fish", "bird")
]


async def test_how_purely_a_feature_stands_for_a_concept(http: httpx.AsyncClient) -> None:
    job = await worked(http, "/v1/steering/sae/trust", {"sae": "features", "texts": LABELLED})
    assert job["state"] == "succeeded", job
    assert job["request"]["texts"] == 40
    assert job["progress"]["done"] == job["progress"]["total"] == 80
    found = job["result"]["concepts"]
    assert {one["concept"] for one in found} == {"fish", "bird"}
    for one in found:
        parts = one["capacity"] * (one["local"] + one["widely"]) / 2
        assert one["fms"] == pytest.approx(parts)
        assert (one["absorption"] is not None) == one["present"]
        assert (await http.get(f"{FEATURES}/{one['feature']}")).json()["trust"] is not None
    lines = "\n".join(map(json.dumps, LABELLED))
    again = await worked(http, "/v1/steering/sae/trust", {"sae": "features", "data": lines})
    assert again["result"] == job["result"]


LABELS = "/v1/steering/saes/features/labels"


async def test_labels_are_kept_by_their_source(http: httpx.AsyncClient) -> None:
    assert (await http.get(LABELS)).json() == {
        "object": "list",
        "sae": "features",
        "own": 3,
        "data": [],
    }
    kept = await http.put(f"{LABELS}/mine", json={"labels": {"1": "Gallic", "2": {"text": "two"}}})
    assert kept.json() == {"source": "mine", "kind": "imported", "labels": 2}
    row = {"modelId": "m", "layer": "2-res-8", "index": "3", "description": "cats"}
    await http.put(f"{LABELS}/np", json={"data": json.dumps(row)})
    found = (await http.get("/v1/steering/saes/features/features")).json()["data"]
    said = {one["feature"]: one["label"]["text"] for one in found}
    assert said == {1: "Gallic", 2: "two", 3: "cats", 5: "French cities", 6: "food"}
    shown = (await http.get(f"{FEATURES}/1")).json()
    assert shown["label"]["source"] == "mine"
    assert [one["text"] for one in shown["labels"]] == ["Gallic", "French words"]
    assert shown["label"]["auroc"] == 0.9
    assert [one["source"] for one in (await http.get(LABELS)).json()["data"]] == ["mine", "np"]
    assert (await http.delete(f"{LABELS}/mine")).json() == {"source": "mine", "deleted": True}
    assert (await http.get(f"{FEATURES}/1")).json()["label"]["text"] == "French words"


async def test_labels_are_made_of_a_survey(http: httpx.AsyncClient) -> None:
    refused = await http.post("/v1/steering/sae/labels", json={"sae": "features"})
    assert refused.json()["error"]["code"] == "no_survey"
    await worked(http, "/v1/steering/sae/survey", {"sae": "features", "prompts": TEXTS})
    job = await worked(http, "/v1/steering/sae/labels", {"sae": "features"})
    assert job["state"] == "succeeded", job
    assert job["result"]["source"] == job["result"]["kind"] == "exemplars"
    shown = [(await http.get(f"{FEATURES}/{n}")).json() for n in range(8)]
    made = [any(x.get("source") == "exemplars" for x in one["labels"]) for one in shown]
    assert made == [not one["statistics"]["dead"] for one in shown]


@pytest.mark.parametrize(
    ("source", "body", "code", "param"),
    [
        ("mine", {}, "invalid_labels", None),
        ("mine", {"labels": {"1": "a"}, "data": "{}"}, "invalid_labels", None),
        ("mine", {"labels": {"8": "a"}}, "wrong_labels", "/labels"),
        ("mine", {"data": "{"}, "invalid_labels", "/data"),
        ("mine", {"data": "{}"}, "no_labels", "/data"),
        ("a@0123456", {"labels": {"1": "a"}}, "invalid_name", "/source"),
    ],
)
async def test_labels_that_are_none_are_refused(
    http: httpx.AsyncClient, source: str, body: dict[str, Any], code: str, param: str | None
) -> None:
    refused = await http.put(f"{LABELS}/{source}", json=body)
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert (error["code"], error["param"]) == (code, param)


@pytest.mark.parametrize(
    ("kind", "body", "code", "param"),
    [
        ("survey", {"sae": "none", "prompts": ["x"]}, "unknown_sae", "/sae"),
        ("survey", {"sae": "features", "prompts": []}, None, "/prompts"),
        (
            "contrast",
            {"sae": "features", "positive": ["x"] * 8, "negative": ["y"]},
            None,
            "/negative",
        ),
        ("trust", {"sae": "none", "texts": LABELLED}, "unknown_sae", "/sae"),
        ("trust", {"sae": "features", "texts": LABELLED[:20]}, "too_few_texts", "/texts"),
        ("trust", {"sae": "features"}, "invalid_value", None),
        (
            "suggest",
            {"sae": "features", "instruction": "x", "prompts": ["?"]},
            "too_few_texts",
            "/prompts",
        ),
        ("suggest", {"sae": "features", "instruction": " "}, None, "/instruction"),
        ("effect", {"sae": "none", "features": [1]}, "unknown_sae", "/sae"),
        ("effect", {"sae": "features", "features": [8]}, "feature_out_of_range", "/features"),
        ("effect", {"sae": "features", "features": []}, None, "/features"),
        ("effect", {"sae": "features", "features": [1], "kl": 0}, None, "/kl"),
    ],
)
async def test_what_cannot_be_read_is_refused_at_its_field(
    http: httpx.AsyncClient, kind: str, body: dict[str, Any], code: str | None, param: str
) -> None:
    refused = await http.post(f"/v1/steering/sae/{kind}", json=body)
    assert 400 <= refused.status_code < 500
    error = refused.json()["error"]
    assert error["param"] == param
    assert code is None or error["code"] == code


async def test_a_damaged_survey_says_so(http: httpx.AsyncClient, registry: Registry) -> None:
    await worked(http, "/v1/steering/sae/survey", {"sae": "features", "prompts": TEXTS})
    sha256 = registry.entry("sae", "features").sha256
    path = await asyncio.to_thread(registry.surveys.local_path, sha256)
    path.write_bytes(path.read_bytes()[:100])
    broken = await http.get(f"{FEATURES}/1")
    assert broken.json()["error"]["code"] == "damaged_survey"
