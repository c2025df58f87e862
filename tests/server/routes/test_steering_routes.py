"""Profiles, validation, features, capabilities and health."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from steer.engines.fake.engine import FakeEngine

PROFILES = "/v1/steering/profiles"
VALIDATE = "/v1/steering/validate"
FEATURES = "/v1/steering/saes/features/features"


async def test_profiles_are_saved_replaced_and_removed(
    http: httpx.AsyncClient, joy: dict[str, Any]
) -> None:
    body = {"name": "cheerful", "spec": joy, "description": "In a good mood"}
    saved = await http.post(PROFILES, json=body)
    assert saved.json() == {
        "object": "steering.profile",
        "model": "fake-model:cheerful",
        "for_model": "fake-model",
        **body,
        "spec": saved.json()["spec"],
    }
    assert saved.json()["spec"]["interventions"][0]["vector"] == "joy"
    await http.post(PROFILES, json={**body, "description": "Changed"})
    listed = (await http.get(PROFILES)).json()["data"]
    assert [profile["description"] for profile in listed] == ["Changed"]
    assert (await http.get(f"{PROFILES}/cheerful")).json() == listed[0]
    assert (await http.delete(f"{PROFILES}/cheerful")).json()["deleted"] is True
    assert (await http.delete(f"{PROFILES}/cheerful")).status_code == 404
    assert (await http.get(f"{PROFILES}/cheerful")).status_code == 404


async def test_a_profile_and_a_spec_together_are_refused(
    http: httpx.AsyncClient, chat: Any, joy: dict[str, Any]
) -> None:
    await http.post(PROFILES, json={"name": "cheerful", "spec": joy})
    body = chat(model="fake-model:cheerful", steering=joy)
    error = (await http.post("/v1/chat/completions", json=body)).json()["error"]
    assert (error["code"], error["param"]) == ("steering_conflict", "/steering")


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"name": "a/b"}, "/name"),
        ({"name": "a@abcdef"}, "/name"),
        ({"name": ""}, "/name"),
        ({"name": 5}, "/name"),
        ({"spec": {"interventions": []}}, "/spec/interventions"),
        ({"spec": "joy"}, "/spec"),
        (
            {"spec": {"interventions": [{"kind": "add", "vector": "gone"}]}},
            "/spec/interventions/0/vector",
        ),
        ({"other": 1}, "/other"),
    ],
)
async def test_profiles_that_could_not_be_used_are_refused(
    http: httpx.AsyncClient, joy: dict[str, Any], change: dict[str, Any], param: str
) -> None:
    response = await http.post(PROFILES, json={"name": "p", "spec": joy, **change})
    assert response.status_code in (400, 404)
    assert response.json()["error"]["param"] == param
    assert (await http.get(PROFILES)).json()["data"] == []


async def test_validation_says_what_would_happen(
    http: httpx.AsyncClient, engine: FakeEngine, joy: dict[str, Any]
) -> None:
    found = (await http.post(VALIDATE, json={"steering": joy})).json()
    assert found["valid"] is True
    assert found["problems"] == []
    assert found["plan"]["hook_points"] == [
        {"layer": 2, "site": "resid_post"},
        {"layer": 3, "site": "resid_post"},
    ]
    assert engine.seen == []


async def test_validation_lists_every_problem(http: httpx.AsyncClient) -> None:
    spec = {
        "interventions": [
            {"kind": "add", "vector": "gone"},
            {"kind": "add", "vector": "joy"},
            {"kind": "add", "vector": "joy", "layers": [77]},
            {"kind": "clamp", "sae": "features", "features": [100], "value": 1},
        ]
    }
    found = (await http.post(VALIDATE, json={"steering": spec, "model": "fake-model"})).json()
    assert found["valid"] is False
    assert [(p["code"], p["param"]) for p in found["problems"]] == [
        ("unknown_vector", "/steering/interventions/0/vector"),
        ("layer_out_of_range", "/steering/interventions/2/layers"),
        ("feature_out_of_range", "/steering/interventions/3/features"),
    ]
    malformed = {"interventions": [{"kind": "add"}, {"kind": "no"}], "norm": "x"}
    found = (await http.post(VALIDATE, json={"steering": malformed, "model": "other"})).json()
    assert [p["param"] for p in found["problems"]] == [
        "/model",
        "/steering/interventions/0/vector",
        "/steering/interventions/1",
        "/steering/norm",
    ]


async def test_features_are_searched_and_shown(http: httpx.AsyncClient) -> None:
    found = (await http.get(FEATURES, params={"q": "french"})).json()
    assert [row["feature"] for row in found["data"]] == [5, 1]
    assert [row["feature"] for row in (await http.get(FEATURES)).json()["data"]] == [1, 5, 6]
    shown = (await http.get(f"{FEATURES}/6")).json()
    assert shown["label"]["text"] == "food"
    assert (shown["layer"], shown["site"]) == (2, "resid_post")
    assert shown["decoder_norm"] > 0
    cosines = [row["cosine"] for row in shown["neighbours"]]
    assert cosines == sorted(cosines, reverse=True)
    assert 6 not in [row["feature"] for row in shown["neighbours"]]
    missing = await http.get(f"{FEATURES}/8")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "unknown_feature")
    assert (await http.get(f"{FEATURES}/x")).json()["error"]["param"] == "/feature"
    assert (await http.get("/v1/steering/saes/none/features")).status_code == 404


async def test_capabilities_and_health(http: httpx.AsyncClient, engine: FakeEngine) -> None:
    found = (await http.get("/v1/steering/capabilities")).json()
    assert found["model"]["n_layers"] == engine.info.n_layers
    assert found["engine"]["kinds"] == list(engine.capabilities.kinds)
    assert list(found["engine"]) == [
        "engine",
        "kinds",
        "sites",
        "strength_units",
        "gate_scopes",
        "sae_architectures",
        "norm_preserving",
        "sampling",
        "roles",
        "readouts",
        "lora",
        "inspection",
        "limits",
    ]
    assert found["engine"]["inspection"] == [
        "patchscope",
        "logit_lens",
        "activations",
        "ask",
        "attribution",
        "trace",
        "weights",
        "match",
        "coordinates",
        "clusters",
        "concepts",
    ]
    assert found["engine"]["sae_architectures"] == [
        "standard",
        "jumprelu",
        "topk",
        "groupmax",
        "abstopk",
        "matching_pursuit",
    ]
    assert found["limits"]["max_choices"] == 32
    assert (await http.get("/health")).json() == {
        "status": "ok",
        "model": "fake-model",
        "engine": "fake",
        "sequences_running": 0,
        "sequences_waiting": 0,
    }
