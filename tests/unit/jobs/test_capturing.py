"""Captures that were ended go on to the same files, and one that is cancelled leaves none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from counting_jobs import QUICK, finished, wait_for
from tiny_models import byte_model

from steer.engines.base import Captured, CaptureRequest, Engine
from steer.engines.fake.tokenizer import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import EngineError
from steer.fit.bulk.card import read_card
from steer.jobs import JobRunner, builtin_kinds
from steer.registry.registry import Registry

TEXTS = [f"a text of number {n}, and of some length" * (1 + n % 2) for n in range(24)]


class Interrupted:
    """An engine that does something when it is asked for states for the n-th time."""

    def __init__(self, engine: Engine, at: int, act: Callable[[], None]) -> None:
        self._engine, self._left, self._act = engine, at, act
        self.alive = True

    def capture(self, request: CaptureRequest) -> list[Captured]:
        self._left -= 1
        if self._left == 0:
            self._act()
        if not self.alive:
            raise EngineError("the engine is gone")
        return self._engine.capture(request)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    model = byte_model(initializer_range=0.2)
    with TransformersEngine(model, ByteTokenizer(), name="lively", rows=8, slots=32) as running:
        yield running


def submitted(runner: JobRunner) -> str:
    """A capture at every site, of files of a MiB."""
    info = runner._engine.info
    points = [{"layer": n, "site": site} for n in range(info.n_layers) for site in info.sites]
    body = {"prompts": TEXTS, "points": points, "answer_tokens": 3, "batch": 5, "shard_mib": 1}
    return runner.submit("capture", runner.kinds["capture"].params.model_validate(body)).id


def runner_on(engine: Any, registry: Registry) -> JobRunner:
    alive = (lambda: engine.alive) if isinstance(engine, Interrupted) else (lambda: True)
    return JobRunner(engine, registry, builtin_kinds(), QUICK, alive=alive)


def contents(folder: Path) -> dict[str, bytes]:
    return {one.name: one.read_bytes() for one in folder.iterdir() if one.suffix != ".lock"}


@pytest.fixture(scope="module")
def whole(engine: TransformersEngine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    with Registry.open(tmp_path_factory.mktemp("whole") / "registry") as registry:
        runner = runner_on(engine, registry)
        runner.start()
        job = finished(runner, submitted(runner))
        runner.stop()
        assert job.state == "succeeded", job.error
        return contents(registry.job_outputs.folder(job.id))


def test_a_job_whose_server_died_goes_on_to_the_same_bytes(
    engine: TransformersEngine, registry: Registry, whole: dict[str, bytes]
) -> None:
    job_id, job, begun = None, None, 0
    # Of five batches: in the first, in the third after a file was written, and in what is left.
    for at in (1, 4, 3, 99):
        dying = Interrupted(engine, at, lambda: setattr(dying, "alive", False))  # noqa: B023
        runner = runner_on(dying, registry)
        job_id = job_id or submitted(runner)
        runner.start()
        job = wait_for(runner, job_id, lambda one: one.finished or not dying.alive)  # noqa: B023
        runner.stop()
        if not job.finished:
            card = read_card(registry.job_outputs.folder(job_id))
            done = 0 if card is None else card.texts_done
            assert done >= begun
            begun = done
    assert job is not None
    assert job.state == "succeeded", job.error
    assert job.attempt > 1
    assert 0 < begun < len(TEXTS)
    assert contents(registry.job_outputs.folder(job.id)) == whole


def test_a_cancelled_capture_leaves_nothing(engine: TransformersEngine, registry: Registry) -> None:
    cancelling = Interrupted(engine, 4, lambda: runner.cancel(job_id))
    runner = runner_on(cancelling, registry)
    job_id = submitted(runner)
    runner.start()
    job = finished(runner, job_id)
    runner.stop()
    assert job.state == "cancelled"
    assert not registry.job_outputs.folder(job_id).exists()


def test_what_no_job_is_remembered_of_is_cleaned(
    engine: TransformersEngine, registry: Registry
) -> None:
    lost = registry.job_outputs.folder("job-lost")
    lost.mkdir(parents=True)
    (lost / "states-00000.safetensors").write_bytes(b"left")
    assert registry.job_outputs.bytes_beside("other") == 4
    runner = runner_on(engine, registry)
    runner.start()
    runner.stop()
    assert not lost.exists()
