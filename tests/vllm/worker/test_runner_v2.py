"""vLLM's model runner V2, which is the default on GPUs, steered on a CPU.

First the runner itself, its kernels interpreted; then the adapter alone on vLLM's own records of a
batch.
"""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import demo_specs
import pytest
import torch
import v2_on_cpu
import vllm_engine

v2_on_cpu.enable()

import v2_by_hand  # noqa: E402
import vllm.v1.worker.gpu.input_batch as input_batches  # noqa: E402
from vllm.config import CUDAGraphMode  # noqa: E402
from vllm.sequence import IntermediateTensors  # noqa: E402
from vllm.v1.worker.cpu_model_runner import CPUModelRunner  # noqa: E402
from vllm.v1.worker.gpu import model_runner  # noqa: E402
from vllm.v1.worker.gpu.model_runner import GPUModelRunner  # noqa: E402
from vllm_contract import assert_same  # noqa: E402
from vllm_crowd import Client, Outcome  # noqa: E402
from vllm_engine import Plans  # noqa: E402
from vllm_simulation import (  # noqa: E402
    Judge,
    assert_all_free,
    core,
    in_engine,
    steering,
    watched,
)

from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams  # noqa: E402
from steer.engines.transformers.engine import TransformersEngine  # noqa: E402
from steer.engines.vllm.front.engine import VllmEngine  # noqa: E402
from steer.engines.vllm.options import SteerOptions, is_static  # noqa: E402
from steer.engines.vllm.static.graph_room import GraphRoom  # noqa: E402
from steer.engines.vllm.taps import ops  # noqa: E402
from steer.engines.vllm.ticket import CaptureOrder, Ticket  # noqa: E402
from steer.engines.vllm.worker.edits import StaticEdits, TapEdits  # noqa: E402
from steer.engines.vllm.worker.prepared import BatchTokens  # noqa: E402
from steer.engines.vllm.worker.requests import receipt  # noqa: E402
from steer.engines.vllm.worker.runner_v1 import RunnerV1  # noqa: E402
from steer.engines.vllm.worker.runner_v2 import RunnerV2  # noqa: E402
from steer.engines.vllm.worker.steering import WorkerSteering  # noqa: E402
from steer.engines.vllm.worker.worker import adapter  # noqa: E402
from steer.errors import EngineError, Unsupported  # noqa: E402
from steer.model import HookPoint  # noqa: E402

STEP_TOKENS, REQUESTS = 64, 8


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    options = {"max_num_batched_tokens": STEP_TOKENS, "max_num_seqs": REQUESTS}
    with vllm_engine.start_engine(registry, **options) as running:
        assert type(worker(running)._runner) is RunnerV2
        yield running


def worker(engine: VllmEngine) -> Any:
    return core(engine).model_executor.driver_worker.worker


@pytest.fixture
def batches(engine: VllmEngine, monkeypatch: pytest.MonkeyPatch) -> list[BatchTokens]:
    """The passes that the adapter has begun, in their order."""
    seen: list[BatchTokens] = []
    begin = steering(engine).begin
    monkeypatch.setattr(
        steering(engine), "begin", lambda batch: (seen.append(batch), begin(batch))[1]
    )
    return seen


# The runner itself


def test_mixed_requests_are_equal_on_both_engines(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans, batches: list[BatchTokens]
) -> None:
    requests = demo_specs.requests_for(plans, len(plans))
    mine, other = engine.complete(requests), reference.complete(requests)
    for request, a, b in zip(requests, mine, other, strict=True):
        assert_same(a, b, request.id)
    in_pieces = [
        one
        for one in batches
        if ((one.starts > 0) & (one.counts > 1)).any() and one.counts.sum() == STEP_TOKENS
    ]
    assert len(in_pieces) >= 5
    assert max(len(one.req_ids) for one in batches) == REQUESTS
    assert_all_free(engine)


def test_captured_states_and_logits_are_the_same(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    points = tuple(HookPoint(layer, site) for layer in (0, 3, 5) for site in engine.info.sites)
    prompts = [(5, 9, 200, 31), tuple(range(40, 130))]
    request = CaptureRequest(prompts, points, plans=[plans["everything"], None], logits="all")
    for mine, other in zip(engine.capture(request), reference.capture(request), strict=True):
        for point in points:
            torch.testing.assert_close(
                mine.states[point], other.states[point], rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(mine.logits, other.logits, rtol=1e-4, atol=1e-4)
    assert_all_free(engine)


def test_preempted_requests_go_on_as_they_were(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    names = ["everything", "generation only", "unsteered", "a token gate", "token triggers"]
    names += ["a prompt gate on what is generated", "a window", "a prompt gate", "prompt only"]
    draw = random.Random(1)
    clients = []
    for n, name in enumerate(names):
        prompt = tuple(draw.randrange(3, demo_specs.VOCABULARY) for _ in range(20 + n))
        sampling = SamplingParams(max_tokens=40, temperature=0, logprobs=2, ignore_eos=True)
        clients.append(Client(GenerationRequest(name, prompt, sampling, plans[name]), name))

    resumed, seats = [], steering(engine).requests
    resume = seats.resume

    def resume_watched(req_id: str, ticket: Any) -> bool:
        again = resume(req_id, ticket)
        if again:
            resumed.append((req_id, seats.get(req_id).plan))
        return again

    monkeypatch.setattr(seats, "resume", resume_watched)
    slots: dict[str, set[int]] = defaultdict(set)
    begin, states = steering(engine).begin, worker(engine).model_runner.req_states

    def begin_watched(batch: BatchTokens) -> None:
        for req_id in batch.req_ids:
            slots[req_id].add(states.req_id_to_index[req_id])
        begin(batch)

    monkeypatch.setattr(steering(engine), "begin", begin_watched)
    with watched(engine) as watch, scarce(engine, blocks=9):
        mine = engine.complete([one.request for one in clients])
    other = reference.complete([one.request for one in clients])

    judge = Judge()
    for client, a, b in zip(clients, mine, other, strict=True):
        judge.check(Outcome.of(client, a), Outcome.of(client, b))
    assert judge.counts["ties"] == 0
    assert len(watch.preempted) == len(resumed) >= 3
    assert sum(plan.gated for _, plan in resumed) >= 2
    assert any(len(slots[req_id]) > 1 for req_id, _ in resumed)
    assert_all_free(engine)


@contextmanager
def scarce(engine: VllmEngine, blocks: int) -> Iterator[None]:
    """Leaves the scheduler so many free blocks of the KV cache."""
    pool = core(engine).scheduler.kv_cache_manager.block_pool
    held = in_engine(engine, lambda: pool.get_new_blocks(pool.get_num_free_blocks() - blocks))
    try:
        yield
    finally:
        in_engine(engine, lambda: pool.free_blocks(held))


def test_dummy_runs_between_steps_disturb_nothing(
    engine: VllmEngine,
    reference: TransformersEngine,
    plans: Plans,
    batches: list[BatchTokens],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sampling = SamplingParams(max_tokens=5, temperature=0, logprobs=2, ignore_eos=True)
    requests = [
        GenerationRequest(name, tuple(range(9 + n, 16 + n)), sampling, plans[name])
        for n, name in enumerate(("everything", "a prompt gate", "unsteered"))
    ]
    scheduler, runner = core(engine).scheduler, worker(engine).model_runner
    schedule, ran = scheduler.schedule, []

    def schedule_after_a_dummy_run(*args: Any, **named: Any) -> Any:
        ran.append(runner._dummy_run(REQUESTS))
        return schedule(*args, **named)

    monkeypatch.setattr(scheduler, "schedule", schedule_after_a_dummy_run)
    mine, other = engine.complete(requests), reference.complete(requests)
    for request, a, b in zip(requests, mine, other, strict=True):
        assert_same(a, b, request.id)
    assert len(ran) >= len(batches) >= 5
    assert_all_free(engine)


# The adapter on vLLM's records of a batch


@pytest.fixture
def by_hand(reference: TransformersEngine) -> v2_by_hand.ByHand:
    info = dataclasses.replace(reference.info, max_length=256)
    return v2_by_hand.ByHand(info)


def test_requests_that_come_go_move_and_return_are_steered_where_they_lie(
    by_hand: v2_by_hand.ByHand, plans: Plans
) -> None:
    names = ["everything", "prompt only", "generation only", "token triggers", "a window"]
    names += ["unsteered", "two phases"]
    draw = random.Random(7)
    running: list[str] = []
    waiting: list[str] = []
    counts = {"steps": 0, "resumed": 0, "finished": 0, "moved": 0}
    steered: dict[str, list[bool]] = {}
    for number in range(150):
        finished = [name for name in running if done(by_hand.known[name])]
        preempted = [n for n in running if n not in finished and draw.random() < 0.1]
        last_slots = {name: by_hand.slot(name) for name in preempted}
        running = [name for name in running if name not in (*finished, *preempted)]
        for name in preempted:
            by_hand.known[name].computed = 0
        new = []
        while len(running) < by_hand.slots and draw.random() < 0.7:
            if waiting and draw.random() < 0.6:
                name = waiting.pop(0)
                one = by_hand.known[name]
                one.computed = draw.randrange(0, 1 + len(steered[name]) // 2)  # from the cache
                counts["resumed"] += 1
            else:
                spec = draw.choice(names)
                tokens = [draw.randrange(3, 300) for _ in range(draw.randint(2, 30))]
                name = f"{number} {len(new)} {spec}"
                by_hand.request(name, tokens, draw.randint(1, len(tokens)), plans[spec])
                steered[name] = []
            new.append(name)
            running.append(name)
        waiting += preempted
        draw.shuffle(running)
        scheduled = {
            name: draw.randint(1, min(left, 12))
            for name in running
            if (left := len(by_hand.known[name].tokens) - by_hand.known[name].computed)
        }
        expected = []
        for name, count in scheduled.items():
            mine = by_hand.known[name].steered(count)
            expected += mine
            start = by_hand.known[name].computed
            steered[name][start : start + count] = mine
        found = by_hand.step(scheduled, new=new, finished=finished, preempted=preempted)
        assert found == expected, number
        counts["steps"] += bool(scheduled)
        counts["moved"] += sum(
            by_hand.slot(name) != slot for name, slot in last_slots.items() if name in running
        )
        for name in finished:
            counts["finished"] += 1
            if by_hand.known[name].plan is not None:
                assert by_hand.steered_tokens(name, len(steered[name])) == sum(steered[name])
        assert not any(by_hand.dummy_run(draw.randint(1, by_hand.slots)))
    assert counts["steps"] > 100
    assert counts["resumed"] > 20
    assert counts["finished"] > 20


def done(one: v2_by_hand.Known) -> bool:
    return one.computed == len(one.tokens)


def test_a_resumed_request_keeps_its_gates_and_its_ledger_in_another_slot(
    by_hand: v2_by_hand.ByHand, plans: Plans
) -> None:
    plan = plans["a prompt gate on what is generated"]
    (gate,) = [one.gate for one in plan.rules]
    opens = gate.direction * 10
    tokens = list(range(10, 20))
    for name in ("a", "b", "c"):
        by_hand.request(name, tokens, 8, plan if name != "c" else None)
    assert by_hand.step({"a": 8}, new=["a"], stream=opens) == [False] * 8
    assert by_hand.step({"b": 8}, new=["b"], stream=-opens) == [False] * 8
    before = by_hand.slot("a")
    by_hand.step({"c": 5, "b": 1}, new=["c"], preempted=["a"], stream=opens)
    # The whole prompt comes from the prefix cache: only the old decision says what to do.
    assert by_hand.step({"b": 1, "a": 1}, new=["a"], stream=-opens) == [False, True]
    assert by_hand.slot("a") != before
    assert by_hand.step({"a": 1}, stream=-opens) == [True]
    by_hand.step({}, finished=["a", "b"])
    assert by_hand.steered_tokens("a", 10) == 2
    assert by_hand.steered_tokens("b", 10) == 0


def test_another_request_of_the_same_name_starts_anew(
    by_hand: v2_by_hand.ByHand, plans: Plans
) -> None:
    plan = plans["a prompt gate on what is generated"]
    (gate,) = [one.gate for one in plan.rules]
    by_hand.request("a", range(10, 20), 8, plan)
    by_hand.step({"a": 8}, new=["a"], stream=gate.direction * 10)
    other = by_hand.request("a", range(10, 20), 8, plan)
    other.ticket = dataclasses.replace(other.ticket, key="another")
    other.computed = 8
    assert by_hand.step({"a": 1}, new=["a"], stream=gate.direction * 10) == [False]


def test_tokens_leave_the_device_once_and_only_for_plans_that_read_them(
    by_hand: v2_by_hand.ByHand, plans: Plans
) -> None:
    for name in ("everything", "a window", "token triggers"):
        by_hand.request(name, range(20), 8, plans[name])
    by_hand.step({"everything": 4, "a window": 6}, new=["everything", "a window"])
    assert by_hand.ids.copies == 0
    other = by_hand.request("other", range(20), 8, plans["token triggers"])
    scheduled = {"a window": 2, "other": 7, "token triggers": 5}
    expected = [flag for name, n in scheduled.items() for flag in by_hand.known[name].steered(n)]
    assert by_hand.step(scheduled, new=["token triggers", other.name]) == expected
    assert by_hand.ids.copies == 1


@pytest.mark.parametrize("static", [True, False])
def test_steps_that_read_states_or_choose_features_leave_their_graph(
    by_hand: v2_by_hand.ByHand, plans: Plans, monkeypatch: pytest.MonkeyPatch, static: bool
) -> None:
    """As vLLM's own dispatcher decides, which here has a graph for everything. In the form without
    kernels there is nothing to leave."""
    graph = SimpleNamespace(cg_mode=CUDAGraphMode.FULL)
    manager = SimpleNamespace(dispatch=lambda *_, **__: graph)
    chosen: list[CUDAGraphMode] = []

    def forward(stream: torch.Tensor) -> list[bool]:
        found, _ = model_runner.dispatch_cg_and_sync_dp(manager, 1, 4, None, 1, 0, need_eager=False)
        chosen.append(found.cg_mode)
        return by_hand.forward(stream)

    monkeypatch.setattr(TapEdits, "static", static)
    if static:
        monkeypatch.setattr(TapEdits, "_room", GraphRoom(0), raising=False)
        monkeypatch.setattr(TapEdits, "graphless", StaticEdits.graphless)
    for name, plan in {"all": "everything", "topk": "a clamp that competes", "read": None}.items():
        by_hand.request(name, range(8), 6, plans[plan] if plan else None)
    order = CaptureOrder((HookPoint(1),), (2,))
    by_hand.known["read"].ticket = Ticket("key of read", capture=order)
    for scheduled in (["all"], ["all", "topk"], ["topk"], ["all", "read"], ["all"]):
        new = [name for name in scheduled if not by_hand.known[name].computed]
        by_hand.step(dict.fromkeys(scheduled, 1), new=new, forward=forward)
    without = CUDAGraphMode.NONE if static else CUDAGraphMode.FULL
    assert chosen == [CUDAGraphMode.FULL, without, without, without, CUDAGraphMode.FULL]


def test_a_pass_that_fails_is_not_counted(by_hand: v2_by_hand.ByHand, plans: Plans) -> None:
    def fail(stream: torch.Tensor) -> list[bool]:
        by_hand.forward(stream)
        raise RuntimeError("out of memory")

    by_hand.request("a", range(8), 6, plans["everything"])
    with pytest.raises(RuntimeError, match="out of memory"):
        by_hand.step({"a": 6}, new=["a"], forward=fail)
    assert ops.running is None
    assert not any(by_hand.dummy_run(2))
    with pytest.raises(EngineError, match="not all seen"):
        by_hand.steered_tokens("a", 6)
    assert by_hand.step({"a": 6}) == [True] * 6
    assert by_hand.steered_tokens("a", 6) == 6


def test_a_pass_that_misses_its_edits_withholds_the_answer(
    by_hand: v2_by_hand.ByHand, plans: Plans
) -> None:
    by_hand.request("a", range(8), 6, plans["everything"])
    by_hand.step({"a": 6}, new=["a"], forward=lambda stream: [False] * len(stream))
    with pytest.raises(EngineError, match="never reached"):
        by_hand.steered_tokens("a", 6)


def test_a_dummy_pass_of_a_stage_gives_what_it_hands_on(
    reference: TransformersEngine,
) -> None:
    class Stage(v2_by_hand.ByHand):
        """The calls of a stage that is not the last, of a model without states."""

        kv_cache_config = SimpleNamespace(kv_cache_groups=[])

        def execute_model(self, tokens: int, *, dummy_run: bool) -> IntermediateTensors:
            assert dummy_run
            halves = {"hidden_states": torch.ones(tokens, 2), "residual": torch.zeros(tokens, 3)}
            return IntermediateTensors(halves)

        def _dummy_run(self, tokens: int, **_: bool) -> tuple[None, None]:
            self.execute_model(tokens, dummy_run=True)
            return None, None

    stage = Stage(reference.info)
    assert stage.adapter.dummy_pass(4).tolist() == [[1, 1, 0, 0, 0]] * 4
    assert "execute_model" not in vars(stage)


AHEAD = {"speculative_config": SimpleNamespace(), "async_scheduling": True}


@pytest.mark.parametrize("config", [{}, AHEAD], ids=["in step", "ahead"])
@pytest.mark.parametrize("spec", ["token triggers", "generation only", "a window", "everything"])
def test_drafts_are_steered_as_what_they_are_and_count_where_they_stay(
    reference: TransformersEngine, plans: Plans, config: dict[str, Any], spec: str
) -> None:
    """Ahead of what it knows, the host takes every draft for accepted: the device has it right."""
    info = dataclasses.replace(reference.info, max_length=256)
    by_hand = v2_by_hand.ByHand(info, vllm_config=v2_by_hand.config(**config))
    draw = random.Random(5)
    names = ["a", "b", "c"]
    for name in names:
        tokens = [draw.randrange(3, 300) for _ in range(40)]
        by_hand.request(name, tokens, 6, plans[spec])
    found = by_hand.step(dict.fromkeys(names, 6), new=names)
    steered = {name: found[6 * n : 6 * n + 6] for n, name in enumerate(names)}
    stayed = dict.fromkeys(names, 0)
    for _ in range(8):
        scheduled = {name: draw.randint(1, v2_by_hand.DRAFTS + 1) for name in names}
        drafted = {}
        for name, count in scheduled.items():
            wrong = tuple(draw.randrange(3, 300) for _ in range(draw.randint(0, count - 1)))
            drafted[name] = v2_by_hand.Drafted(count - 1, wrong)
            steered[name] += by_hand.known[name].steered(count - len(wrong))
            stayed[name] += count - 1 - len(wrong)
        by_hand.step(scheduled, drafted=drafted)
    for name in names:
        fed = by_hand.known[name].computed
        record = by_hand.steering.requests.records(f"key of {name}")[0]
        told = receipt(record, fed)
        assert told.tokens_steered == sum(steered[name])
        assert told.speculation is not None
        assert told.speculation.accepted == stayed[name]


# What is refused


def test_each_runner_has_its_adapter_and_others_are_refused_by_name_and_version() -> None:
    assert adapter(object.__new__(GPUModelRunner)) is RunnerV2
    assert adapter(object.__new__(CPUModelRunner)) is RunnerV1
    with pytest.raises(Unsupported, match=r"SimpleNamespace of vLLM \d.*gpu\.model_runner"):
        adapter(SimpleNamespace())


def refused(runner: Any, sentence: str) -> None:
    with pytest.raises(Unsupported, match=sentence):
        RunnerV2(runner, WorkerSteering.__new__(WorkerSteering))


def test_a_model_state_of_another_make_is_refused(
    by_hand: v2_by_hand.ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(by_hand.model_state, "prepare_inputs", lambda batch: {})
    refused(by_hand, r"vLLM \d.*prepare_inputs takes \('batch',\)")


def test_an_input_batch_of_another_make_is_refused(
    by_hand: v2_by_hand.ByHand, monkeypatch: pytest.MonkeyPatch
) -> None:
    less = dataclasses.make_dataclass("InputBatch", ["req_ids", "num_tokens", "input_ids"])
    monkeypatch.setattr(input_batches, "InputBatch", less)
    refused(by_hand, r"lacks \['num_computed_tokens_np', 'num_draft_tokens_per_req'")


@pytest.mark.parametrize(
    ("name", "other", "sentence"),
    [
        ("execute_model", lambda self, output: self.forward(output), "no longer calls"),
        ("add_requests", lambda self: None, "add_requests takes"),
    ],
)
def test_a_runner_of_another_make_is_refused(
    by_hand: v2_by_hand.ByHand,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    other: Any,
    sentence: str,
) -> None:
    monkeypatch.setattr(GPUModelRunner, name, other)
    refused(by_hand, rf"vLLM \d.*{sentence}")


@pytest.mark.parametrize(
    ("field", "value", "sentence"),
    [
        (
            "speculative_config",
            SimpleNamespace(enable_adaptive_verification=True),
            "enable_adaptive_verification",
        ),
        ("use_ubatching", True, r"micro-batching \(enable_dbo"),
        ("prefill_context_parallel_size", 2, "prefill_context_parallel_size"),
        ("kv_sharing_fast_prefill", True, "kv_sharing_fast_prefill"),
    ],
)
def test_configurations_that_cannot_be_steered_are_refused_by_name(
    by_hand: v2_by_hand.ByHand, field: str, value: Any, sentence: str
) -> None:
    by_hand.vllm_config = v2_by_hand.config(**{field: value})
    refused(by_hand, sentence)


def test_several_tokens_in_a_step_are_refused(by_hand: v2_by_hand.ByHand) -> None:
    by_hand.model_state.num_new_sampled_tokens_per_step = 4
    refused(by_hand, "several tokens in a step")


def test_a_real_configuration_has_what_is_read_of_it(engine: VllmEngine) -> None:
    """The refusals read attributes that vLLM has: a name that it drops must not pass unseen."""
    real = core(engine).vllm_config
    for part in ("parallel_config", "cache_config"):
        for name, value in vars(getattr(v2_by_hand.config(), part)).items():
            assert getattr(getattr(real, part), name) == value


@pytest.mark.parametrize("mode", [one for one in CUDAGraphMode if one != CUDAGraphMode.NONE])
def test_graphs_take_the_static_form_or_are_refused(
    engine: VllmEngine, mode: CUDAGraphMode
) -> None:
    config = copy.copy(core(engine).vllm_config)
    assert not is_static(config, SteerOptions())
    config.compilation_config = copy.copy(config.compilation_config)
    config.compilation_config.cudagraph_mode = mode
    assert is_static(config, SteerOptions())
    with pytest.raises(Unsupported, match=rf"cudagraph_mode={mode.name}.*enforce-eager"):
        is_static(config, SteerOptions(form="python"))
