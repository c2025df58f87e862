"""vLLM over several processes: tensor parallelism, pipeline stages, and a core that is replaced.

Everything is compared with the transformers engine, which is one process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import demo_specs
import parallel_runner
import pytest
import torch
import vllm_engine
from child_runs import run_child
from vllm_engine import Plans

from steer.engines.base import Completion
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.pipeline import gathered_answers, merged_answers, unknown_answer
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry

COMPARED = 200
"""Tokens of a request without an end that are compared: the model's context holds no more."""

RUNNER = Path(parallel_runner.__file__)


@dataclass
class Result:
    """What a job wrote."""

    answers: dict[str, Any]
    tensors: dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def engine(reference: TransformersEngine) -> TransformersEngine:
    """What plans are made for: vLLM's own engines run in other processes."""
    return reference


@pytest.fixture(scope="module")
def run(registry: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Result]:
    """Runs a job in a process of its own, and all of vLLM's processes below it."""
    root = tmp_path_factory.mktemp("parallel")

    def start(name: str, *, as_client: bool, **options: Any) -> Result:
        job = {
            "registry": str(registry),
            "options": {**vllm_engine.OPTIONS, **vllm_engine.ALL_SITES, **options},
            "as_client": as_client,
            "out": str(root / f"{name}.json"),
            "tensors": str(root / f"{name}.pt"),
        }
        run_child(RUNNER, job, root, name)
        tensors = torch.load(job["tensors"])
        return Result(json.loads(Path(job["out"]).read_text()), tensors)

    return start


@pytest.fixture(scope="module")
def tensor_parallel(run: Callable[..., Result]) -> Result:
    return run(
        "tensor",
        as_client=True,
        tensor_parallel_size=2,
        max_model_len=parallel_runner.CONTEXT,
        hf_overrides={"max_position_embeddings": parallel_runner.CONTEXT},
    )


@pytest.fixture(scope="module")
def pipelined(run: Callable[..., Result]) -> Result:
    return run("pipeline", as_client=False, pipeline_parallel_size=2)


def test_tensor_parallel_workers_give_the_same_tokens_and_receipts(
    tensor_parallel: Result, reference: TransformersEngine, plans: Plans
) -> None:
    assert_completions(tensor_parallel, reference, plans)


def test_tensor_parallel_workers_capture_and_unembed(
    tensor_parallel: Result, reference: TransformersEngine, plans: Plans
) -> None:
    assert_tensors(tensor_parallel, reference, plans)


def test_a_vector_uploaded_while_requests_run_reaches_every_worker(
    tensor_parallel: Result,
    registry: Path,
    reference: TransformersEngine,
    plans: Plans,
) -> None:
    late = tensor_parallel.answers["late"]
    with Registry.open(registry) as opened:
        cache = PlanCache(opened, reference.info, reference.capabilities)
        plan = cache.plan(demo_specs.parse_spec(parallel_runner.LATE_SPEC))
    expected, plain, long = reference.complete(
        [
            parallel_runner.same_request(plan, "late"),
            parallel_runner.same_request(None, "plain"),
            parallel_runner.same_request(plans["every layer"], "long", tokens=COMPARED),
        ]
    )
    assert_same(late["done"], expected, "late")
    assert expected.tokens != plain.tokens
    assert late["others"] == 4
    for tokens, (finish, receipt) in zip(late["long"], late["ends"], strict=True):
        assert finish == "stop"
        assert tokens[:COMPARED] == list(long.tokens[: len(tokens)])
        fed = len(parallel_runner.PROMPT) + len(tokens) - 1
        assert receipt["tokens_steered"] + receipt["tokens_skipped"] == fed


def test_an_engine_core_that_replaces_a_killed_one_serves_the_same_plan(
    tensor_parallel: Result, reference: TransformersEngine, plans: Plans
) -> None:
    """The front end's plans are in the store already, and it puts none there again."""
    answers = tensor_parallel.answers
    request = parallel_runner.same_request(plans["everything"], "before")
    expected = reference.complete([request])[0]
    assert_same(answers["before"], expected, "before")
    assert answers["dead"] == "engine_error"
    assert_same(answers["restarted"], expected, "restarted")


def test_pipeline_stages_give_the_same_tokens_and_receipts(
    pipelined: Result, reference: TransformersEngine, plans: Plans
) -> None:
    assert_completions(pipelined, reference, plans)
    gated = {name for name, plan in plans.items() if plan is not None and plan.gated}
    assert len(gated) >= 5
    assert {"prompt", "token", "onward"} == set(pipelined.answers["gate scopes"])


def test_pipeline_stages_capture_and_unembed(
    pipelined: Result, reference: TransformersEngine, plans: Plans
) -> None:
    assert_tensors(pipelined, reference, plans)


# Putting together what workers say


def _answer(layers: list[int], **fields: Any) -> dict[str, Any]:
    points = [{"layer": layer, "site": "resid_post", "tokens": 3} for layer in layers]
    plain = {"fingerprint": "f", "tokens_steered": 3, "tokens_skipped": 1, "tokens_cached": 0}
    return {**plain, "hook_points": points, "gates": [], **fields}


def test_the_hook_points_of_all_stages_are_listed_once_in_forward_order() -> None:
    workers = [[{0: _answer(layers)}] for layers in ([4], [4], [0, 2], [0, 2])]
    assert merged_answers(workers) == [{0: _answer([0, 2, 4])}]


def test_a_worker_that_did_not_steer_withholds_the_answer() -> None:
    failed = {"error": "no such plan", "code": "not_steered"}
    for workers in ([[{0: failed}], [{0: _answer([1])}]], [[{0: _answer([1])}], [{0: failed}]]):
        assert merged_answers(workers) == [{0: failed}]
    assert "error" in merged_answers([[{0: _answer([1])}], [{}]])[0][0]


def test_the_last_stage_says_what_gates_did() -> None:
    """A stage knows the gates that it decides and those before it."""
    gates = [{"name": name, "fired": 1, "value": None} for name in "ab"]
    none = _answer([0])
    first = _answer([1, 2], gates=gates[:1], tokens_steered=1, tokens_skipped=3)
    last = _answer([4], gates=gates, tokens_steered=2, tokens_skipped=2)
    workers = [[{0: answer}] for answer in (none, none, first, first, last, last)]
    assert merged_answers(workers) == [
        {0: _answer([0, 1, 2, 4], gates=gates, tokens_steered=2, tokens_skipped=2)}
    ]
    other = _answer([4], gates=gates, tokens_steered=3)
    assert merged_answers([*workers, [{0: other}]])[0][0]["code"] == "workers_disagree"


@pytest.mark.parametrize("name", ["tokens_steered", "tokens_skipped", "tokens_cached"])
def test_workers_that_counted_differently_withhold_the_answer(name: str) -> None:
    workers = [
        [{0: _answer([1]), 1: _answer([1])}],
        [{0: _answer([1], **{name: 7}), 1: _answer([1])}],
    ]
    first = merged_answers(workers)[0]
    assert first[0]["code"] == "workers_disagree"
    assert first[1] == _answer([1])


def test_of_several_engines_the_one_that_ran_a_choice_answers_for_it() -> None:
    nothing = unknown_answer()
    ran = [[{0: _answer([1]), 1: nothing}], [{0: _answer([2]), 1: nothing}]]
    other = [[{0: nothing, 1: _answer([1])}], [{0: nothing, 1: _answer([2])}]]
    both = {0: _answer([1, 2]), 1: _answer([1, 2])}
    assert gathered_answers([ran, other]) == gathered_answers([other, ran]) == [both]
    lost = gathered_answers([ran, ran])[0]
    assert lost[0] == both[0]
    assert "error" in lost[1]
    failed = {"error": "no such plan", "code": "not_steered"}
    assert gathered_answers([[[{0: nothing}]], [[{0: failed}]]]) == [{0: failed}]


def assert_completions(
    result: Result,
    reference: TransformersEngine,
    plans: Plans,
) -> None:
    requests = parallel_runner.sample(plans)
    found = result.answers["completions"]
    assert len(found) == len(requests) >= 40
    for request, expected in zip(requests, reference.complete(requests), strict=True):
        assert_same(found[request.id], expected, request.id)
    assert result.answers["in use"] == [0, 0]


def assert_same(mine: Mapping[str, Any], expected: Completion, name: str) -> None:
    other = parallel_runner.as_json(expected)
    assert mine["tokens"] == other["tokens"], name
    assert mine["finish"] == other["finish"], name
    logprobs = [value for value, _ in mine["logprobs"]]
    assert logprobs == pytest.approx([value for value, _ in other["logprobs"]], abs=1e-4), name
    receipt = mine["receipt"]
    if receipt is not None:
        # What the prefix cache gave is steered all the same; the reference has no such cache.
        assert receipt["tokens_cached"] <= receipt["tokens_steered"]
        receipt = {**receipt, "tokens_cached": 0}
    assert vllm_engine.plain(receipt) == vllm_engine.plain(other["receipt"]), name
    if receipt is not None:
        pairs = zip(receipt["hook_points"], other["receipt"]["hook_points"], strict=True)
        for point, wanted in pairs:
            size = wanted.get("relative_size")
            close = None if size is None else pytest.approx(size, rel=1e-3)
            assert point.get("relative_size") == close, name


def assert_tensors(result: Result, reference: TransformersEngine, plans: Plans) -> None:
    """States, logits, and what looks inside of heads and neurons."""
    expected = parallel_runner.capture_all(reference, plans)
    expected |= parallel_runner.look_inside(reference)
    assert sum(name.startswith("inside/") for name in expected) > 40
    assert result.tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(
            result.tensors[name],
            tensor,
            rtol=1e-4,
            atol=1e-4,
            msg=lambda m, name=name: f"{name} {m}",
        )
