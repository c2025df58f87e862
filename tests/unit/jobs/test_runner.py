"""The life of a job: run, fail, be cancelled, be stopped, be bounded."""

from __future__ import annotations

import threading
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from counting_jobs import QUICK, CountParams, Gate, Make, counting, finished, wait_for
from liveness import LIVENESS_SECONDS

from steer.engines.fake.engine import FakeEngine, fake_model
from steer.errors import CapacityError, Conflict, StorageError, UnknownArtefact
from steer.registry.jobs.job_records import Job
from steer.registry.jobs.job_store import JobStore
from steer.registry.registry import Registry


def states(runner: Any, job_id: str) -> list[str]:
    _, events = runner.store.events(job_id)
    return [event.data["state"] for event in events if event.type == "state"]


def test_a_job_runs_and_tells_how_far_it_is(make: Make, gate: Gate, registry: Registry) -> None:
    ended: list[tuple[Job, float]] = []
    runner = make(counting(gate), ended=lambda job, seconds: ended.append((job, seconds)))
    queued = runner.submit("count", CountParams(steps=3))
    assert (queued.state, queued.attempt, queued.started_at) == ("queued", 0, None)
    assert queued.request == {"steps": 3}
    runner.start()
    job = finished(runner, queued.id)
    assert job.state == "succeeded"
    assert job.result == {"counted": 3, "files": []}
    assert (job.progress.done, job.progress.total, job.progress.note) == (3, 3, "counting")
    assert job.created_at <= job.started_at <= job.finished_at
    _, events = runner.store.events(job.id)
    assert [event.number for event in events] == list(range(1, job.last_event + 1))
    assert states(runner, job.id) == ["queued", "running", "succeeded"]
    done = [event.data["done"] for event in events if event.type == "progress"]
    assert done == sorted(done)
    assert {1, 2, 3} <= set(done)
    _, later = runner.store.events(job.id, after=events[1].number)
    assert later == events[2:]
    runner.stop(LIVENESS_SECONDS)
    assert [(one.id, one.state) for one, seconds in ended if seconds >= 0] == [
        (job.id, "succeeded")
    ]


@pytest.mark.parametrize(
    ("params", "code", "param"),
    [
        (CountParams(fail_at=1), "told", "/fail_at"),
        (CountParams(crash_at=1), "job_failed", None),
    ],
)
def test_a_failure_says_why(
    make: Make, gate: Gate, params: CountParams, code: str, param: str | None
) -> None:
    runner = make(counting(gate))
    runner.start()
    job = finished(runner, runner.submit("count", params).id)
    assert job.state == "failed"
    assert (job.error.code, job.error.param) == (code, param)
    assert job.progress.done == 1
    # and the thread is there for the next one
    assert finished(runner, runner.submit("count", CountParams()).id).state == "succeeded"


def test_a_fault_of_the_server_is_told_without_its_paths(make: Make, gate: Gate) -> None:
    def run(*_: Any) -> dict[str, Any]:
        raise FileNotFoundError(2, "No such file", "/srv/secret-place/model")

    runner = make(replace(counting(gate), run=run))
    runner.start()
    job = finished(runner, runner.submit("count", CountParams()).id)
    assert (job.state, job.error.code) == ("failed", "job_failed")
    assert "FileNotFoundError" in job.error.message
    assert "secret-place" not in job.error.message


def test_a_result_that_is_no_json_fails_the_job(make: Make, gate: Gate) -> None:
    runner = make(replace(counting(gate), run=lambda *_: {"value": float("nan")}))
    runner.start()
    job = finished(runner, runner.submit("count", CountParams()).id)
    assert (job.state, job.error.code) == ("failed", "job_failed")


def test_a_queued_job_is_cancelled_at_once(make: Make, gate: Gate) -> None:
    ended: list[str] = []
    runner = make(counting(gate), ended=lambda job, _: ended.append(job.state))
    job = runner.submit("count", CountParams())
    assert runner.cancel(job.id).state == "cancelled"
    assert runner.cancel(job.id).state == "cancelled"
    assert states(runner, job.id) == ["queued", "cancelled"]
    assert ended == ["cancelled"]
    runner.start()
    done = finished(runner, runner.submit("count", CountParams()).id)
    assert done.state == "succeeded"
    assert gate.begun == 1


def test_a_running_job_is_cancelled_at_its_next_report(make: Make, gate: Gate) -> None:
    gate.open = False
    runner = make(counting(gate))
    runner.start()
    job = runner.submit("count", CountParams(steps=100))
    gate.allow(2)
    wait_for(runner, job.id, lambda one: one.progress.done == 2)
    assert runner.cancel(job.id).cancelling
    gate.allow(1)
    done = finished(runner, job.id)
    assert (done.state, done.error, done.cancelling) == ("cancelled", None, False)
    assert done.progress.done == 2
    assert states(runner, job.id) == ["queued", "running", "cancelled"]


def test_a_job_is_cancelled_through_another_server(
    make: Make, gate: Gate, registry: Registry, tmp_path: Path
) -> None:
    gate.open = False
    runner = make(counting(gate))
    runner.start()
    job = runner.submit("count", CountParams(steps=100))
    gate.await_step()
    with Registry.open(tmp_path / "registry") as other:
        make(counting(gate), over=other).cancel(job.id)
    gate.allow(100)
    assert finished(runner, job.id).state == "cancelled"


def test_finished_jobs_are_not_cancelled_and_others_not_deleted(make: Make, gate: Gate) -> None:
    runner = make(counting(gate))
    job = runner.submit("count", CountParams())
    with pytest.raises(Conflict) as raised:
        runner.remove(job.id)
    assert raised.value.code == "job_not_finished"
    runner.start()
    finished(runner, job.id)
    with pytest.raises(Conflict) as raised:
        runner.cancel(job.id)
    assert raised.value.code == "job_finished"
    runner.remove(job.id)
    for call in (runner.remove, runner.cancel, runner.store.get, runner.store.events):
        with pytest.raises(UnknownArtefact) as unknown:
            call(job.id)
        assert unknown.value.code == "unknown_job"


def test_the_queue_is_bounded(make: Make, gate: Gate) -> None:
    runner = make(counting(gate), limits=replace(QUICK, queue=2))
    first = runner.submit("count", CountParams())
    runner.submit("count", CountParams())
    with pytest.raises(CapacityError) as raised:
        runner.submit("count", CountParams())
    assert raised.value.status == 503
    runner.cancel(first.id)
    runner.submit("count", CountParams())


@pytest.mark.parametrize("workers", [1, 2])
def test_so_many_run_at_a_time(make: Make, gate: Gate, workers: int) -> None:
    gate.open = False
    runner = make(counting(gate), limits=replace(QUICK, workers=workers))
    runner.start()
    jobs = [runner.submit("count", CountParams(steps=1)) for _ in range(4)]
    for _ in range(workers):
        gate.await_step()
    assert gate.running == workers
    gate.allow(4)
    for job in jobs:
        assert finished(runner, job.id).state == "succeeded"
    assert gate.most == workers


def test_jobs_begin_in_the_order_they_came(make: Make, gate: Gate) -> None:
    runner = make(counting(gate))
    jobs = [runner.submit("count", CountParams(steps=1)) for _ in range(4)]
    runner.start()
    begun = [finished(runner, job.id).started_at for job in jobs]
    assert begun == sorted(begun)
    newest = [job.id for job in runner.store.page(limit=2, offset=1)]
    assert newest == [jobs[2].id, jobs[1].id]


def test_only_so_many_finished_jobs_are_kept(make: Make, gate: Gate) -> None:
    runner = make(counting(gate), limits=replace(QUICK, keep=2))
    runner.start()
    jobs = [runner.submit("count", CountParams(steps=1)) for _ in range(4)]
    finished(runner, jobs[-1].id)
    runner.stop(LIVENESS_SECONDS)  # the last one is pruned after its end was told
    assert [job.id for job in runner.store.page()] == [jobs[3].id, jobs[2].id]


def test_stopping_puts_a_repeatable_job_back(make: Make, gate: Gate) -> None:
    gate.open = False
    kind = counting(gate, repeatable=True)
    runner = make(kind)
    runner.start()
    job = runner.submit("count", CountParams(steps=100))
    gate.allow(1)
    wait_for(runner, job.id, lambda one: one.progress.done == 1)
    stopping = threading.Thread(target=runner.stop, args=(LIVENESS_SECONDS,))
    stopping.start()
    assert runner._stopping.wait(LIVENESS_SECONDS)
    gate.allow(100)
    stopping.join(LIVENESS_SECONDS)
    assert not stopping.is_alive()
    left = runner.store.get(job.id)
    assert (left.state, left.progress.done) == ("queued", 1)
    second = make(kind)
    gate.open = True
    second.start()
    done = finished(second, job.id)
    assert (done.state, done.attempt) == ("succeeded", 2)
    assert states(second, job.id) == ["queued", "running", "queued", "running", "succeeded"]


def test_stopping_interrupts_another_job(make: Make, gate: Gate) -> None:
    gate.open = False
    runner = make(counting(gate))
    runner.start()
    job = runner.submit("count", CountParams(steps=100))
    gate.await_step()
    stopping = threading.Thread(target=runner.stop, args=(LIVENESS_SECONDS,))
    stopping.start()
    assert runner._stopping.wait(LIVENESS_SECONDS)
    gate.allow(100)
    stopping.join(LIVENESS_SECONDS)
    assert not stopping.is_alive()
    left = runner.store.get(job.id)
    assert (left.state, left.error.code) == ("interrupted", "job_interrupted")


@pytest.mark.parametrize(("repeatable", "state"), [(True, "queued"), (False, "interrupted")])
@pytest.mark.parametrize("fault", [{"fail_at": 0}, {"crash_at": 0}])
def test_a_job_does_not_fail_because_the_engine_died(
    make: Make, gate: Gate, repeatable: bool, state: str, fault: dict[str, int]
) -> None:
    runner = make(counting(gate, repeatable=repeatable), alive=lambda: False)
    job = runner.submit("count", CountParams(**fault))
    waiting = runner.submit("count", CountParams(**fault))
    runner.start()
    wait_for(runner, job.id, lambda one: one.attempt == 1 and one.state != "running")
    runner.stop(LIVENESS_SECONDS)
    assert runner.store.get(job.id).state == state
    # Without an engine no other job may be begun either.
    assert (runner.store.get(waiting.id).state, gate.begun) == ("queued", 1)


@pytest.mark.parametrize(("repeatable", "state"), [(True, "queued"), (False, "interrupted")])
def test_a_job_that_does_not_report_holds_up_nobody(
    make: Make, gate: Gate, repeatable: bool, state: str
) -> None:
    gate.open = False
    runner = make(counting(gate, repeatable=repeatable))
    runner.start()
    job = runner.submit("count", CountParams(steps=1))
    gate.await_step()
    thread = next(one for one in runner._threads if one.name == "steer-jobs-worker")
    runner.stop(patience=0)
    assert runner.store.get(job.id).state == state
    gate.allow(100)
    thread.join(LIVENESS_SECONDS)
    assert not thread.is_alive()
    assert runner.store.get(job.id).state == state


def test_files_come_with_the_job_and_go_with_it(
    make: Make, gate: Gate, registry: Registry, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    sent.write_text("content")
    runner = make(counting(gate))
    job = runner.submit("count", CountParams(), files={"upload": sent})
    assert not sent.exists()
    assert (registry.job_files.folder(job.id) / "upload").read_text() == "content"
    registry.job_files.clean(runner.store.unfinished)
    runner.start()
    assert finished(runner, job.id).result["files"] == ["upload"]
    runner.stop(LIVENESS_SECONDS)
    assert not registry.job_files.folder(job.id).exists()


def test_a_job_that_is_not_queued_leaves_no_files(
    make: Make, gate: Gate, registry: Registry, tmp_path: Path
) -> None:
    sent = tmp_path / "sent"
    sent.write_text("content")
    runner = make(counting(gate), limits=replace(QUICK, queue=1))
    runner.submit("count", CountParams())
    with pytest.raises(CapacityError):
        runner.submit("count", CountParams(), files={"upload": sent})
    abandoned = registry.job_files.folder("job-of-a-crash")
    abandoned.mkdir()
    runner.start()
    assert [one.name for one in abandoned.parent.iterdir() if one.is_dir()] == []


def test_a_server_of_another_model_leaves_the_job(make: Make, gate: Gate) -> None:
    other = FakeEngine(fake_model(name="another"))
    kind = counting(gate)
    job = make(kind, engine=other).submit("count", CountParams())
    runner = make(kind)
    runner.start()
    assert finished(runner, runner.submit("count", CountParams()).id).state == "succeeded"
    assert runner.store.get(job.id).state == "queued"
    anybody = make(counting(gate, any_model=True), engine=other).submit("count", CountParams())
    runner._post()
    assert finished(runner, anybody.id).state == "succeeded"


def test_an_end_that_cannot_be_written_is_not_lost(
    make: Make, gate: Gate, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The catalogue fails just then: the lease lapses and the job is taken up again.

    Leases are reckoned in the test's time; how often they are looked at, in the machine's.
    """
    now = datetime(2026, 1, 1)
    runner = make(counting(gate, repeatable=True), limits=replace(QUICK, lease_seconds=0.05))
    runner.store = JobStore(registry._catalogue, lambda: now)
    real, failures = runner.store.finish, []

    def fails_once(*args: Any, **named: Any) -> Any:
        if len(failures) < 2:
            failures.append(args)
            raise StorageError("the disk is full")
        return real(*args, **named)

    monkeypatch.setattr(runner.store, "finish", fails_once)
    runner.start()
    job = runner.submit("count", CountParams())
    # Once nobody runs it any more, nobody renews its lease either.
    wait_for(runner, job.id, lambda _: len(failures) == 2 and not runner._runs)
    assert runner.store.get(job.id).state == "running"
    now += timedelta(seconds=1)
    done = wait_for(runner, job.id, lambda one: one.state == "succeeded")
    assert done.attempt == 2
