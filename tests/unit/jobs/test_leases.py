"""Two servers on one catalogue, and what a crash leaves behind."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from queue import SimpleQueue

import pytest
from counting_jobs import CountParams, Gate, Make, counting, finished
from liveness import LIVENESS_SECONDS

from steer.registry.jobs import job_store
from steer.registry.jobs.job_records import Claim, JobFailure, JobProgress
from steer.registry.jobs.job_store import JobDraft, JobStore
from steer.registry.registry import Registry

GONE = JobFailure("job_interrupted", "gone")


class Clock:
    def __init__(self) -> None:
        self.time = datetime(2026, 1, 1)

    def __call__(self) -> datetime:
        return self.time

    def pass_(self, seconds: float) -> None:
        self.time += timedelta(seconds=seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def stores(tmp_path: Path, clock: Clock) -> Iterator[tuple[JobStore, JobStore]]:
    """The same catalogue, opened by two."""
    with Registry.open(tmp_path) as first, Registry.open(tmp_path) as second:
        yield JobStore(first._catalogue, clock), JobStore(second._catalogue, clock)


def queue(store: JobStore, job_id: str, kind: str = "count", place: str | None = None) -> None:
    store.submit(JobDraft(job_id, kind, "{}", "{}", "model", place), queue=1000)


def claim(store: JobStore, owner: str, place: str = "here") -> Claim | None:
    return store.claim(owner, kinds=["count"], model="model", place=place, lease=10)


def test_a_job_is_claimed_once(stores: tuple[JobStore, JobStore]) -> None:
    for number in range(40):
        queue(stores[0], f"job-{number:02}")
    taken: list[list[str]] = [[], []]

    def take(place: int) -> None:
        while (found := claim(stores[place], f"owner-{place}")) is not None:
            taken[place].append(found.job_id)

    threads = [threading.Thread(target=take, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIVENESS_SECONDS)
    assert sorted(taken[0] + taken[1]) == [f"job-{number:02}" for number in range(40)]


def test_what_others_cannot_run_is_left_to_them(stores: tuple[JobStore, JobStore]) -> None:
    store = stores[0]
    queue(store, "job-1", kind="another")
    queue(store, "job-2", place="there")
    assert claim(store, "a") is None
    assert claim(store, "a", place="there").job_id == "job-2"


def test_a_lease_that_is_renewed_holds(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    mine, theirs = stores
    queue(mine, "job-1")
    held = claim(mine, "a")
    for _ in range(4):
        clock.pass_(6)
        mine.renew("a", ["job-1"], lease=10)
        assert theirs.recover(repeatable=["count"], attempts=3, error=GONE) == 0
    assert mine.finish(held, "succeeded", result={}).state == "succeeded"


def test_a_lease_that_lapsed_ends_the_writes_of_its_owner(
    stores: tuple[JobStore, JobStore], clock: Clock
) -> None:
    slow, other = stores
    queue(slow, "job-1")
    held = claim(slow, "a")
    assert slow.progress(held, JobProgress(1, 5, "x")).progress.done == 1
    clock.pass_(11)
    assert other.recover(repeatable=["count"], attempts=3, error=GONE) == 1
    job, events = other.events("job-1")
    assert (job.state, job.progress.done) == ("queued", 1)
    assert events[-1].data == {"state": "queued", "error": {**GONE.__dict__}}

    def changes_nothing() -> None:
        before = other.events("job-1")
        assert slow.progress(held, JobProgress(2, 5, "x")) is None
        assert slow.finish(held, "succeeded", result={"by": "a"}) is None
        assert slow.give_up(held, again=True, error=GONE) is None
        slow.renew("a", ["job-1"], lease=1000)
        assert other.events("job-1") == before

    changes_nothing()  # while nobody has it
    again = claim(other, "b")
    changes_nothing()  # and while another has
    assert other.finish(again, "succeeded", result={"by": "b"}).result == {"by": "b"}
    assert other.get("job-1").attempt == 2


def test_the_same_owner_in_an_earlier_attempt_is_another(
    stores: tuple[JobStore, JobStore], clock: Clock
) -> None:
    store = stores[0]
    queue(store, "job-1")
    first = claim(store, "a")
    clock.pass_(11)
    store.recover(repeatable=["count"], attempts=3, error=GONE)
    second = claim(store, "a")
    assert store.finish(first, "succeeded", result={}) is None
    assert store.finish(second, "succeeded", result={}).attempt == 2


def test_a_job_is_not_begun_for_ever(stores: tuple[JobStore, JobStore], clock: Clock) -> None:
    store = stores[0]
    queue(store, "job-1")
    for attempt in (1, 2, 3):
        assert claim(store, "a").attempt == attempt
        clock.pass_(11)
        store.recover(repeatable=["count"], attempts=3, error=GONE)
    assert claim(store, "a") is None
    job = store.get("job-1")
    assert (job.state, job.error) == ("interrupted", GONE)


def test_a_job_that_may_not_be_repeated_is_interrupted(
    stores: tuple[JobStore, JobStore], clock: Clock
) -> None:
    store = stores[0]
    queue(store, "job-1")
    store.progress(claim(store, "a"), JobProgress(2, 5, "half way"))
    clock.pass_(11)
    assert store.recover(repeatable=[], attempts=3, error=GONE) == 1
    job = store.get("job-1")
    assert (job.state, job.progress) == ("interrupted", JobProgress(2, 5, "half way"))
    assert claim(store, "a") is None


def test_a_job_that_was_being_cancelled_is_cancelled(
    stores: tuple[JobStore, JobStore], clock: Clock
) -> None:
    store = stores[0]
    queue(store, "job-1")
    claim(store, "a")
    store.cancel("job-1")
    clock.pass_(11)
    store.recover(repeatable=["count"], attempts=3, error=GONE)
    job = store.get("job-1")
    assert (job.state, job.error) == ("cancelled", None)


def test_events_are_bounded_and_keep_the_states(
    stores: tuple[JobStore, JobStore], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(job_store, "KEPT_EVENTS", 10)
    store = stores[0]
    queue(store, "job-1")
    held = claim(store, "a")
    for done in range(25):
        store.progress(held, JobProgress(done, None, ""))
    store.finish(held, "succeeded", result={})
    job, events = store.events("job-1")
    numbers = [event.number for event in events]
    assert 10 <= len(events) <= 13
    assert numbers[:2] == [1, 2]
    assert numbers[2:] == list(range(numbers[2], job.last_event + 1))
    assert [event.data["state"] for event in events if event.type == "state"] == [
        "queued",
        "running",
        "succeeded",
    ]


CRASH = """
import sys
sys.path.insert(0, sys.argv[2])
from counting_jobs import QUICK, CountParams, Gate, counting
from steer.engines.fake.engine import FakeEngine
from steer.jobs import JobRunner
from steer.registry.registry import Registry

gate = Gate()
gate.open = False
gate.allow(2)
kind = counting(gate, repeatable=sys.argv[3] == "True")
runner = JobRunner(FakeEngine(), Registry.open(sys.argv[1]), {"count": kind}, QUICK)
running = runner.submit("count", CountParams(steps=5))
waiting = runner.submit("count", CountParams(steps=1))
runner.start()
for _ in range(3):  # at its third step two are reported
    gate.reached.acquire()
print(running.id, waiting.id, flush=True)
gate.reached.acquire()
"""


@pytest.mark.parametrize("repeatable", [True, False])
def test_a_killed_server_loses_no_job(
    tmp_path: Path, make: Make, gate: Gate, repeatable: bool
) -> None:
    root, support = tmp_path / "shared", Path(__file__).parents[2] / "support"
    command = [sys.executable, "-c", CRASH, str(root), str(support), str(repeatable)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        line = process.stdout.readline()
        os.kill(process.pid, signal.SIGKILL)
    running, waiting = line.split()
    with Registry.open(root) as registry:
        job = registry.jobs.get(running)
        assert (job.state, job.progress.done, job.progress.total) == ("running", 2, 5)
        runner = make(counting(gate, repeatable=repeatable), over=registry)
        ahead = JobStore(registry._catalogue, lambda: datetime(2100, 1, 1))
        runner.store = ahead  # the lease has lapsed by then
        runner.start()
        assert finished(runner, waiting).state == "succeeded"
        job = finished(runner, running)
        runner.stop()
    if repeatable:
        assert (job.state, job.attempt, job.result["counted"]) == ("succeeded", 2, 5)
    else:
        assert (job.state, job.progress.done) == ("interrupted", 2)
        assert job.error.code == "job_interrupted"


def test_two_servers_share_the_work(make: Make, gate: Gate, tmp_path: Path) -> None:
    """Through their own connections; no job is begun twice."""
    kind = counting(gate)
    with Registry.open(tmp_path / "registry") as second:
        ended: SimpleQueue[str] = SimpleQueue()
        runners = [
            make(kind, over=over, ended=lambda job, seconds: ended.put(job.id))
            for over in (None, second)
        ]
        for runner in runners:
            runner.start()
        jobs = [runners[n % 2].submit("count", CountParams(steps=2)) for n in range(12)]
        told = [ended.get(timeout=LIVENESS_SECONDS) for _ in jobs]
        assert sorted(told) == sorted(job.id for job in jobs)
        assert {runners[0].store.get(job.id).state for job in jobs} == {"succeeded"}
        assert gate.begun == 12
        for runner in runners:
            runner.stop()
