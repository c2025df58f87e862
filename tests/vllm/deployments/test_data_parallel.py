"""Two data-parallel ranks behind one server: requests of one client run on either, and each comes
back with its receipt."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from liveness import LIVENESS_SECONDS
from prometheus_client.parser import text_string_to_metric_families
from vllm_server import per_engine, running_server

QUESTION = "How are you today?"
ALL = {"phases": ["prompt", "generation"]}
EVERYWHERE = {"interventions": [{"kind": "add", "vector": "french", "where": ALL}]}
REQUESTS = 24


@pytest.fixture(scope="module")
def http(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    registry = tmp_path_factory.mktemp("server") / "registry"
    with (
        running_server(registry, "--engine-option", "data_parallel_size=2") as url,
        httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as client,
    ):
        yield client


def ask(http: httpx.Client, **fields: Any) -> dict[str, Any]:
    body = {
        "model": "steer-demo",
        "messages": [{"role": "user", "content": QUESTION}],
        "temperature": 0,
        "max_tokens": 12,
        "ignore_eos": True,
        **fields,
    }
    response = http.post("/v1/chat/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


@pytest.mark.parametrize(
    "fields",
    [
        {},  # the receipt comes with the last output
        {"stop": ["never"]},  # the front end asks for it
        {"n": 3, "temperature": 1.0},  # choices run on either rank
    ],
    ids=str,
)
def test_every_request_has_its_receipt_wherever_it_ran(
    http: httpx.Client, fields: dict[str, Any]
) -> None:
    before = per_engine(http, "vllm:generation_tokens_total")
    with ThreadPoolExecutor(8) as threads:
        answers = list(
            threads.map(lambda n: ask(http, steering=EVERYWHERE, seed=n, **fields), range(REQUESTS))
        )
    choices = fields.get("n", 1)
    for answer in answers:
        used, found = answer["usage"], answer["steering"]
        assert len(answer["choices"]) == choices
        prompt, generated = used["prompt_tokens"], used["completion_tokens"]
        assert found["tokens_steered"] == choices * (prompt - 1) + generated
        assert found["tokens_skipped"] == 0
    after = per_engine(http, "vllm:generation_tokens_total")
    assert {"0", "1"} == set(after)
    assert all(after[engine] > before[engine] for engine in after)


def test_states_are_read_wherever_the_prompt_ran(http: httpx.Client) -> None:
    answers = [
        http.post("/v1/inspect/logit-lens", json={"text": "the cat sat", "top": 2})
        for _ in range(4)
    ]
    assert [one.status_code for one in answers] == [200] * 4, answers[0].text
    assert all(one.json() == answers[0].json() for one in answers)


def test_slots_of_all_ranks_are_counted(http: httpx.Client) -> None:
    figures = {
        sample.name: sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.name.startswith("steer_slots")
    }
    assert figures["steer_slots"] == 2 * 16  # max_num_seqs of each
    assert figures["steer_slots_in_use"] == 0
