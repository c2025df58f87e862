"""Waiting for edit rows, in vLLM's own asynchronous engine; its workers ignore the tickets."""

from __future__ import annotations

import itertools
from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from vllm import LLM, SamplingParams
from vllm.sampling_params import RequestOutputKind
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import RequestStatus

from steer.engines.vllm import seams
from steer.engines.vllm.core.admission import check_tickets
from steer.engines.vllm.core.cache_keys import fork_block_keys, ticket_of
from steer.engines.vllm.core.scheduler import (
    RowBudget,
    SteerAsyncScheduler,
    SteerScheduler,
    holds_back,
    scheduler_name,
)
from steer.engines.vllm.ticket import Ticket
from steer.errors import EngineError, Unsupported
from steer.plan.selection import EVERYWHERE, Selection

ROWS = 8
PROMPT = list(range(3, 13))
FINAL_ONLY = RequestOutputKind.FINAL_ONLY


@pytest.fixture(scope="module")
def llm():
    fork_block_keys()
    check_tickets()
    return LLM(
        "vectors/demo/model",
        dtype="float32",
        enforce_eager=True,
        block_size=32,
        max_model_len=256,
        gpu_memory_utilization=0.3,
        async_scheduling=True,
        scheduler_cls="steer.engines.vllm.core.scheduler.SteerAsyncScheduler",
        additional_config={"steer": {"edit_rows": ROWS}},
    )


@pytest.fixture
def engine(llm):
    """The engine, idle before and after."""
    assert not llm.llm_engine.has_unfinished_requests()
    yield Driven(llm)
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    assert not llm.llm_engine.has_unfinished_requests()
    assert scheduler.get_num_unfinished_requests() == 0
    assert scheduler.edit_rows.used == 0


class Driven:
    """Steps an engine, and looks at its scheduler after each step."""

    numbers = itertools.count()

    def __init__(self, llm):
        self.engine = llm.llm_engine
        self.scheduler = self.engine.engine_core.engine_core.scheduler
        self.ids = {}
        self.started = []
        self.finished = {}
        self.together = 0

    def add(self, name, rows=None, fingerprint=None, *, tokens=6, prompt=PROMPT, **fields):
        extra = None
        if rows is not None:
            ticket = Ticket(
                name,
                fingerprint=fingerprint or name,
                plan="0" * 64,
                rows=rows,
                selections=(EVERYWHERE,),
            )
            extra = ticket.as_extra_args()
        params = SamplingParams(
            max_tokens=tokens, ignore_eos=True, extra_args=extra, **{"temperature": 0.0, **fields}
        )
        given = f"{name}-{next(self.numbers)}"
        self.ids[name] = self.engine.add_request(given, {"prompt_token_ids": list(prompt)}, params)

    def step(self):
        for output in self.engine.step():
            name = output.request_id.split("-")[0]
            if output.finished:
                self.finished[name] = output
        running = self.scheduler.running
        for request in running:
            name = request.request_id.split("-")[0]
            if name not in self.started:
                self.started.append(name)
        plans = {}
        for request in running:
            if (ticket := ticket_of(request)) is not None:
                plans[ticket.fingerprint] = ticket.rows
        assert sum(plans.values()) <= self.scheduler.edit_rows.used <= ROWS
        self.together = max(self.together, len(running))

    def run(self, limit=500):
        for _ in range(limit):
            if not self.engine.has_unfinished_requests():
                return
            self.step()
        pytest.fail(f"not done after {limit} steps; finished {list(self.finished)}")

    def waiting(self):
        return [request.request_id.split("-")[0] for request in self.scheduler.waiting]

    def abort(self, name):
        self.engine.abort_request([self.ids[name]], internal=True)


def test_requests_wait_for_rows_and_all_finish_in_order(engine):
    names = [f"r{number}" for number in range(7)]
    for name in names:
        engine.add(name, rows=3)
    engine.step()
    assert engine.waiting() == names[2:]
    assert engine.scheduler.get_request_counts() == (2, 5)
    assert engine.scheduler.has_unfinished_requests()
    assert engine.scheduler.get_num_unfinished_requests() == 7
    engine.run()
    assert engine.started == names
    assert sorted(engine.finished) == names
    assert engine.together == 2
    assert {len(one.outputs[0].token_ids) for one in engine.finished.values()} == {6}


def test_requests_with_one_plan_share_its_rows(engine):
    for number in range(5):
        engine.add(f"r{number}", rows=ROWS, fingerprint="same")
    engine.step()
    assert engine.scheduler.edit_rows.used == ROWS
    assert engine.waiting() == []
    engine.run()
    assert engine.together == 5


def test_requests_without_rows_pass_those_that_wait(engine):
    engine.add("first", rows=ROWS, tokens=12)
    engine.add("held", rows=1)
    engine.add("plain", tokens=3)
    engine.add("shifts", rows=0, tokens=3)
    engine.run()
    assert list(engine.finished) == ["plain", "shifts", "first", "held"]


def test_a_request_that_waits_is_not_starved_by_smaller_ones(engine):
    engine.add("popular0", rows=5, fingerprint="popular", tokens=10)
    engine.add("held", rows=6)
    for number in range(1, 6):
        engine.step()
        engine.add(f"popular{number}", rows=5, fingerprint="popular")
        engine.add(f"small{number}", rows=1)
    engine.run()
    assert engine.started[:2] == ["popular0", "held"]
    assert len(engine.finished) == 12


def test_a_request_is_aborted_while_it_waits(engine):
    engine.add("first", rows=ROWS, tokens=8)
    engine.add("held", rows=ROWS)
    engine.add("next", rows=2)
    engine.step()
    engine.abort("held")
    assert engine.waiting() == ["next"]
    assert engine.scheduler.edit_rows.used == ROWS
    engine.run()
    assert engine.started == ["first", "next"]
    assert sorted(engine.finished) == ["first", "next"]


def test_an_abort_makes_room(engine):
    engine.add("first", rows=ROWS, tokens=200)
    engine.add("held", rows=ROWS, tokens=3)
    engine.step()
    engine.step()
    engine.abort("first")
    engine.run(limit=20)
    assert list(engine.finished) == ["held"]


def test_everything_is_aborted_at_once(engine):
    for number in range(4):
        engine.add(f"r{number}", rows=5)
    engine.step()
    engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
    engine.engine.output_processor.abort_requests(list(engine.ids.values()), internal=True)
    assert engine.scheduler.edit_rows.used == 0
    engine.add("after", rows=ROWS)
    engine.run(limit=30)
    assert list(engine.finished) == ["after"]


def test_a_preempted_request_keeps_its_rows(engine):
    engine.add("first", rows=5, tokens=12)
    engine.add("held", rows=5)
    for _ in range(4):
        engine.step()
    engine.scheduler.reset_prefix_cache(reset_running_requests=True)
    assert engine.waiting() == ["first", "held"]
    assert engine.scheduler.edit_rows.used == 5
    engine.run()
    assert list(engine.finished) == ["first", "held"]
    assert len(engine.finished["first"].outputs[0].token_ids) == 12


def test_choices_of_one_request_share_its_rows(engine):
    engine.add("first", rows=5, n=3, temperature=1.0, output_kind=FINAL_ONLY)
    engine.add("held", rows=5)
    engine.run()
    assert engine.together == 3
    assert len(engine.finished["first"].outputs) == 3
    assert list(engine.finished) == ["first", "held"]


def test_the_answer_of_a_request_that_waited_is_the_same(engine):
    engine.add("alone", rows=ROWS)
    engine.run()
    engine.add("first", rows=ROWS, fingerprint="other")
    engine.add("held", rows=ROWS, fingerprint="alone")
    engine.run()
    alone, held = (engine.finished[name].outputs[0].token_ids for name in ("alone", "held"))
    assert list(held) == list(alone)


# Cached blocks, as the engine finds them


def cached(engine, name, prompt, selection=None, tokens=40):
    extra = None
    if selection is not None:
        extra = Ticket("k", 1, "spec", "1" * 64, 0, (selection,)).as_extra_args()
    params = SamplingParams(max_tokens=tokens, ignore_eos=True, temperature=0.0, extra_args=extra)
    given = f"{name}-{next(Driven.numbers)}"
    engine.engine.add_request(given, {"prompt_token_ids": list(prompt)}, params)
    engine.run()
    output = engine.finished[name]
    return output.num_cached_tokens, list(prompt) + list(output.outputs[0].token_ids)


@pytest.mark.parametrize("start", [300, 500], ids=["plain first", "steered first"])
def test_what_the_cache_serves(engine, start):
    prompt = [start + number for number in range(100)]
    generation = Selection(phases=frozenset({"generation"}))
    orders = [None, EVERYWHERE] if start == 300 else [EVERYWHERE, None]
    for selection in orders:
        assert cached(engine, "first", prompt, selection)[0] == 0
    for selection in orders:
        assert cached(engine, "again", prompt, selection)[0] == 96
    assert cached(engine, "generating", prompt, generation)[0] == 96


def test_a_generated_block_is_not_served_to_the_next_turn_without_steering(engine):
    prompt = [700 + number for number in range(100)]
    _, turn = cached(engine, "steered", prompt, Selection(phases=frozenset({"generation"})))
    assert cached(engine, "plain", [*turn, 5], None)[0] == 96
    prompt = [200 + number for number in range(100)]
    _, turn = cached(engine, "plain", prompt, None)
    assert cached(engine, "turn", [*turn, 5], None)[0] == 128


# The budget alone


@settings(max_examples=500)
@given(
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(0, 5), st.integers(1, 4)), max_size=30)
)
def test_the_budget_is_kept_in_order_and_nobody_waits_forever(arrivals):
    budget = RowBudget(5)
    waiting = deque((str(n), *arrival) for n, arrival in enumerate(arrivals))
    running, admitted = {}, []
    while waiting or running:
        budget.new_round()
        held = deque()
        for request_id, fingerprint, rows, steps in waiting:
            if budget.admit(request_id, fingerprint, rows):
                running[request_id] = (fingerprint, rows, steps)
                if rows:
                    admitted.append(int(request_id))
            else:
                assert rows > 0
                held.append((request_id, fingerprint, rows, steps))
        waiting = held
        assert running, "a request waits for nobody"
        plans = {(name, rows) for name, rows, _ in running.values()}
        assert budget.used == sum(rows for _, rows in plans) <= budget.capacity
        for request_id, (name, rows, steps) in list(running.items()):
            running[request_id] = (name, rows, steps - 1)
            if steps == 1:
                del running[request_id]
                budget.release(request_id)
                budget.release(request_id)
    assert admitted == sorted(admitted)
    assert budget.used == 0


# Which class, and which vLLM


class _Config:
    def __init__(self, scheduler_cls, async_scheduling):
        self.scheduler_cls, self.async_scheduling = scheduler_cls, async_scheduling

    def get_scheduler_cls(self):
        from vllm.config import SchedulerConfig

        return SchedulerConfig.get_scheduler_cls(self)


@pytest.mark.parametrize(
    ("asynchronous", "chosen"), [(True, SteerAsyncScheduler), (False, SteerScheduler)]
)
def test_the_scheduler_that_vllm_would_use_is_the_one_extended(asynchronous, chosen):
    name = scheduler_name(_Config(None, asynchronous))
    assert name == f"{chosen.__module__}.{chosen.__qualname__}"
    again = _Config(name, asynchronous)
    assert again.get_scheduler_cls() is chosen
    assert scheduler_name(again) == name
    assert holds_back(again)
    assert not holds_back(_Config(None, asynchronous))
    assert issubclass(chosen, AsyncScheduler) is asynchronous


def test_another_scheduler_is_refused_by_name():
    name = "vllm.v1.core.sched.diffusion_scheduler.DiffusionAsyncScheduler"
    with pytest.raises(Unsupported, match="DiffusionAsyncScheduler"):
        scheduler_name(_Config(name, True))
    assert not holds_back(_Config(name, True))


def test_a_scheduler_is_not_chosen_before_vllm_has_decided():
    with pytest.raises(EngineError, match="not decided"):
        scheduler_name(_Config(None, None))


@pytest.mark.parametrize("name", ["_handle_blocked_waiting_request", "_free_request"])
def test_an_unknown_signature_is_refused_by_name_and_version(monkeypatch, name):
    monkeypatch.setattr(Scheduler, name, lambda self, other: None)
    with pytest.raises(Unsupported, match=rf"in vLLM \d.*Scheduler\.{name} takes"):
        scheduler_name(_Config(None, False))


def test_a_scheduler_that_never_asks_is_refused(monkeypatch):
    def schedule(self, throttle_prefills=False):
        return None

    monkeypatch.setattr(Scheduler, "schedule", schedule)
    with pytest.raises(Unsupported, match=r"no longer calls.*_handle_blocked_waiting_request"):
        scheduler_name(_Config(None, False))


def test_an_engine_core_without_checks_does_not_start(llm, monkeypatch):
    from vllm.v1.engine.core import EngineCore

    plain = seams.inspect.unwrap(EngineCore.preprocess_add_request)
    monkeypatch.setattr(EngineCore, "preprocess_add_request", plain)
    with pytest.raises(EngineError, match="without a check"):
        SteerAsyncScheduler(vllm_config=llm.llm_engine.vllm_config)
