"""Two data-parallel ranks of a mixture of experts, each with half of the experts: they run in step,
and a rank without requests runs passes of nothing for the other."""

from __future__ import annotations

import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_specs
import httpx
import pytest
import vllm_engine
from artefacts import random_vector
from liveness import LIVENESS_SECONDS
from transformers import AutoTokenizer
from vllm_models import ARCHITECTURES, WIDTH, write
from vllm_server import per_engine, running_server

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Completion, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry
from steer.spec import parse_spec

VECTORS = {f"v{n}": random_vector(n, 0, 1, 2, width=WIDTH) for n in range(3)}
SPECS: dict[str, Any] = {
    "unsteered": None,
    "everything": {"interventions": [{"kind": "add", "vector": "v0", "layers": [0, 1]}]},
    "generation": {
        "interventions": [{"kind": "ablate", "vector": "v1", "layers": [1, 2]}],
        "where": {"phases": ["generation"]},
    },
    "gated": {
        "interventions": [{"kind": "add", "vector": "v2", "layers": [1]}],
        "when": {"vector": "v1", "above": 0.0, "layer": 0, "scope": "token"},
    },
}
REQUESTS, TOLD = 24, 8


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("experts")
    mixtral = ARCHITECTURES["mixtral"]
    vocabulary = {"vocab_size": demo_specs.VOCABULARY}
    write(replace(mixtral, options=mixtral.options | vocabulary), folder)
    AutoTokenizer.from_pretrained(vllm_engine.DEMO_MODEL).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def http(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    registry = tmp_path_factory.mktemp("registry")
    with Registry.open(registry) as opened:
        for name, vector in VECTORS.items():
            opened.add(name, vector)
    options = ("data_parallel_size=2", "enable_expert_parallel=true", "max_model_len=128")
    arguments = [part for option in options for part in ("--engine-option", option)]
    with (
        running_server(
            registry, "--model", str(model), "--served-name", "experts", *arguments
        ) as url,
        httpx.Client(base_url=url, timeout=LIVENESS_SECONDS) as client,
    ):
        yield client


@pytest.fixture(scope="module")
def requests() -> list[tuple[str, tuple[int, ...]]]:
    """The spec and the prompt of each."""
    draw = random.Random(5)
    names = [*SPECS] * (REQUESTS // len(SPECS))
    return [(name, tuple(draw.randrange(3, 3000) for _ in range(12))) for name in names]


@pytest.fixture(scope="module")
def wanted(model: Path, requests: list[tuple[str, tuple[int, ...]]]) -> list[Completion]:
    sampling = SamplingParams(max_tokens=TOLD, temperature=0, logprobs=1, ignore_eos=True)
    with TransformersEngine.load(model, name="experts") as engine:
        cache = PlanCache(MemoryLibrary(VECTORS), engine.info, engine.capabilities)
        plans = {
            name: None if spec is None else cache.plan(parse_spec(spec))
            for name, spec in SPECS.items()
        }
        return engine.complete(
            [GenerationRequest(name, prompt, sampling, plans[name]) for name, prompt in requests]
        )


def ask(http: httpx.Client, name: str, prompt: tuple[int, ...]) -> dict[str, Any]:
    body = {
        "model": "experts",
        "prompt": list(prompt),
        "temperature": 0,
        "max_tokens": TOLD,
        "ignore_eos": True,
        "logprobs": 1,
        "return_token_ids": True,
    }
    if SPECS[name] is not None:
        body["steering"] = SPECS[name]
    response = http.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def assert_same(answer: dict[str, Any], other: Completion) -> None:
    (choice,) = answer["choices"]
    assert tuple(choice["token_ids"]) == other.tokens
    scores = [one.logprob for one in other.logprobs]
    assert choice["logprobs"]["token_logprobs"] == pytest.approx(scores, abs=1e-3)
    if other.receipt is None:
        assert "steering" not in answer
        return
    for count in ("tokens_steered", "tokens_skipped"):
        assert answer["steering"][count] == getattr(other.receipt, count)


def test_ranks_in_step_steer_their_own_requests(
    http: httpx.Client,
    requests: list[tuple[str, tuple[int, ...]]],
    wanted: list[Completion],
) -> None:
    with ThreadPoolExecutor(8) as threads:
        answers = list(threads.map(lambda one: ask(http, *one), requests))
    for answer, other in zip(answers, wanted, strict=True):
        assert_same(answer, other)
    counts = per_engine(http, "vllm:generation_tokens_total")
    assert set(counts) == {"0", "1"}
    assert min(counts.values()) > 0


def test_a_request_alone_is_steered_beside_a_rank_that_has_none(
    http: httpx.Client,
    requests: list[tuple[str, tuple[int, ...]]],
    wanted: list[Completion],
) -> None:
    for one, other in list(zip(requests, wanted, strict=True))[: len(SPECS)]:
        assert_same(ask(http, *one), other)
