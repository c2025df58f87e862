"""Two data-parallel ranks behind one server: requests of one client run on either, and each comes
back with its receipt. Ranks with experts run in step, in a child process of their own."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import experts_runner
import httpx
import parallel_runner
import pytest
import torch
import vllm_engine
from child_runs import run_child
from liveness import LIVENESS_SECONDS
from prometheus_client.parser import text_string_to_metric_families
from vllm_models import ARCHITECTURES, write
from vllm_server import per_engine, running_server

from steer.engines.transformers.engine import TransformersEngine

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


@pytest.fixture(scope="module")
def experts(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[dict[str, Any], dict[str, torch.Tensor], TransformersEngine]]:
    """What two engines with experts answered, in step with one another, and the transformers engine
    over the same weights."""
    root = tmp_path_factory.mktemp("experts")
    model = write(ARCHITECTURES["qwen3-moe"], root / "model")
    options = {
        **vllm_engine.OPTIONS,
        **vllm_engine.ALL_SITES,
        "model": str(root / "model"),
        "max_model_len": 128,
        "skip_tokenizer_init": True,
        "data_parallel_size": 2,
    }
    job = {
        "registry": str(root / "registry"),
        "options": options,
        "out": str(root / "answers.json"),
        "tensors": str(root / "tensors.pt"),
    }
    run_child(Path(experts_runner.__file__), job, root, "experts")
    answers = json.loads((root / "answers.json").read_text())
    with TransformersEngine(model, None, rows=32, slots=32) as reference:
        yield answers, torch.load(root / "tensors.pt"), reference


def test_experts_on_both_ranks_are_steered_as_on_one(experts: Any) -> None:
    """In a crowd, and each alone, while the other rank runs passes of nothing."""
    answers, _, reference = experts
    plans = experts_runner.plans_for(reference.info)
    done = answers["completions"]
    for wave, group in enumerate(experts_runner.crowd_and_loners(plans)):
        for request, wanted in zip(group, reference.complete(group), strict=True):
            mine, other = done.pop(f"{wave} {request.id}"), parallel_runner.as_json(wanted)
            assert mine["tokens"] == other["tokens"], request.id
            chances = [[value for value, _ in one["logprobs"]] for one in (mine, other)]
            assert chances[0] == pytest.approx(chances[1], abs=1e-4), request.id
            if mine["receipt"] is not None:
                mine["receipt"]["tokens_cached"] = 0  # the reference has no cache
            receipts = [vllm_engine.plain(one["receipt"]) for one in (mine, other)]
            assert receipts[0] == receipts[1], request.id
    assert not done
    assert answers["in use"] == [0, 0]


def test_states_and_what_lies_before_experts_are_told(experts: Any) -> None:
    """What lies behind them no rank runs by itself; both serve on afterwards."""
    answers, tensors, reference = experts
    plans = experts_runner.plans_for(reference.info)
    wanted = experts_runner.captured(reference, plans)
    assert tensors.keys() == wanted.keys()
    for name, one in wanted.items():
        torch.testing.assert_close(tensors[name], one, rtol=1e-4, atol=1e-4)
    assert answers["behind the experts"] == "cannot_carry"
    (last,) = reference.complete(experts_runner.requests(plans, 1)[:1])
    assert answers["afterwards"]["tokens"] == list(last.tokens)
