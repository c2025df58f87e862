"""Metrics: what they count, that labels stay bounded, and that the docs list them all."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from steer.engines.fake.controls import FakeFailure
from steer.engines.fake.engine import FakeEngine
from steer_server.metrics import Names

URL = "/v1/chat/completions"
DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"


async def figures(http: httpx.AsyncClient) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    text = (await http.get("/metrics")).text
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def value(found: dict[Any, float], name: str, **labels: str) -> float:
    return found.get((name, tuple(sorted(labels.items()))), 0.0)


async def test_requests_and_tokens_are_counted(
    http: httpx.AsyncClient, chat: Any, joy: dict[str, Any]
) -> None:
    await http.post("/v1/steering/profiles", json={"name": "cheerful", "spec": joy})
    plain = (await http.post(URL, json=chat())).json()
    steered = (await http.post(URL, json=chat(steering=joy, receipt="full"))).json()
    await http.post(URL, json=chat(model="fake-model:cheerful", stream=True))
    await http.post(URL, json=chat(steering={"interventions": [{"kind": "x"}]}))
    found = await figures(http)
    assert plain["usage"]["completion_tokens"]
    assert value(found, "steer_requests_total", profile="none", outcome="ok") == 2
    assert value(found, "steer_requests_total", profile="cheerful", outcome="ok") == 1
    assert value(found, "steer_vector_requests_total", vector="joy", outcome="ok") == 2
    assert value(found, "steer_rejects_total", code="invalid_spec") == 1
    receipt = steered["steering"]
    assert value(found, "steer_tokens_total", treatment="steered") == 2 * receipt["tokens_steered"]
    assert value(found, "steer_strength_ratio_bucket", le="2.0") == 2
    assert value(found, "steer_strength_ratio_bucket", le="1.0") == 0
    assert value(found, "steer_edit_size_ratio_count") == 2  # one request, two hook points
    assert value(found, "steer_time_to_first_token_seconds_count", steered="true") == 2
    assert value(found, "steer_time_to_first_token_seconds_count", steered="false") == 1
    assert value(found, "steer_time_per_output_token_seconds_count", steered="true") == 2
    assert value(found, "steer_plan_cache_misses_total") == 1
    assert value(found, "steer_plan_cache_hits_total") == 2
    assert value(found, "steer_plan_compile_seconds_count") == 1
    assert value(found, "steer_slots") == 64
    assert value(found, "steer_slots_in_use") == 0
    assert value(found, "steer_registry_bytes") > 0
    assert value(found, "steer_registry_artefacts", kind="vector") == 4
    assert value(found, "steer_registry_artefacts", kind="profile") == 1
    assert value(found, "steer_registry_operations_total", operation="put_profile") == 1


async def test_failures_and_gates_are_counted(
    http: httpx.AsyncClient, chat: Any, joy: dict[str, Any], engine: FakeEngine
) -> None:
    gated = {**joy, "when": {"vector": "joy", "above": 0.1, "layer": 2, "scope": "token"}}
    fired = (await http.post(URL, json=chat(steering=gated))).json()["steering"]["gates"][0][
        "fired"
    ]
    engine.failure = FakeFailure(after=1)
    assert (await http.post(URL, json=chat())).status_code == 500
    assert (await http.post(URL, json=chat(stream=True))).status_code == 200
    found = await figures(http)
    assert value(found, "steer_gate_fires_total") == fired > 0
    assert value(found, "steer_requests_total", profile="none", outcome="error") == 2
    assert value(found, "steer_rejects_total", code="engine_error") == 2


@pytest.mark.parametrize("limit", [1, 3])
def test_names_beyond_the_limit_share_a_label(limit: int) -> None:
    names = Names(limit)
    labels = [names.label(f"v{n}") for n in range(10)]
    assert labels == [f"v{n}" for n in range(limit)] + ["other"] * (10 - limit)
    assert names.label("v0") == "v0"
    assert names.label("v9") == "other"


async def test_unknown_names_never_become_labels(http: httpx.AsyncClient, chat: Any) -> None:
    for n in range(5):
        spec = {"interventions": [{"kind": "add", "vector": f"made-up-{n}"}]}
        await http.post(URL, json=chat(steering=spec, model="fake-model"))
        await http.post(URL, json=chat(model=f"fake-model:made-up-{n}"))
    assert "made-up" not in (await http.get("/metrics")).text


async def test_the_docs_list_exactly_what_there_is(http: httpx.AsyncClient) -> None:
    text = (await http.get("/metrics")).text
    kinds = {
        (family.name + ("_total" if family.type == "counter" else ""), family.type)
        for family in text_string_to_metric_families(text)
        if not family.name.endswith("_created")
    }
    rows = re.findall(r"^\| `(steer_\w+)` \| (\w+) \|", DOCS.read_text(), flags=re.MULTILINE)
    assert set(rows) == kinds
    assert len(rows) == len(kinds)
