"""Fits that were ended go on from their bookmark, to the bit."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from counting_jobs import QUICK, wait_for
from safetensors.torch import load, save

from steer.engines.journal import JournaledEngine, forget
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import EngineError, StorageError
from steer.fit import fit_jacobian_lens, fit_low_rank, fit_prosv, fit_reps, fit_tuned_lens
from steer.fit.data.exercises import Exercise, ExerciseSet
from steer.fit.data.preferences import Preference, PreferenceSet
from steer.fit.methods import bookmark
from steer.fit.methods.bookmark import Bookmark
from steer.fit.methods.lenses.jacobian import PARTS
from steer.jobs import JobRunner, builtin_kinds
from steer.registry.registry import Registry

TEXTS = [f"{word} {n} and on it goes" for n in range(6) for word in ("how", "why", "who")]
EXERCISES = ExerciseSet.of([Exercise(text, "yes") for text in TEXTS])
PREFERENCES = PreferenceSet.of([Preference(text, "yes", "no") for text in TEXTS])
Fit = Callable[[Any, Callable[[int], None] | None], Any]
FITS: dict[str, Fit] = {
    "jacobian-lens": lambda engine, told: fit_jacobian_lens(
        engine, TEXTS, name="x", skip=3, average=2, batch=1, progress=told
    ),
    "tuned-lens": lambda engine, told: fit_tuned_lens(
        engine, TEXTS, name="x", steps=6, rows=8, batch=2, progress=told
    ),
    "low-rank": lambda engine, told: fit_low_rank(
        engine, EXERCISES, name="x", layers=[1], steps=6, batch=4, progress=told
    ),
    "reps": lambda engine, told: fit_reps(
        engine, PREFERENCES, name="x", layers=[1], steps=6, batch=4, progress=told
    ),
    "prosv": lambda engine, told: fit_prosv(
        engine, PREFERENCES, name="x", layers=[1], steps=6, batch=4, progress=told
    ),
}


class Ended(Exception):
    """What a user's interrupt stands for."""


@pytest.fixture(autouse=True)
def _every_bookmark(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a bookmark took to write, the next is written too."""
    monkeypatch.setattr(bookmark, "_SHARE", 0)


class Counted:
    """An engine that counts its pieces of work, and is gone after so many."""

    def __init__(self, engine: TransformersEngine, left: int | None = None) -> None:
        self._engine, self.left, self.alive = engine, left, True
        self.pieces, self.texts = 0, 0

    def differentiate(self, work: Any) -> Any:
        self._count()
        self.pieces += 1
        return self._engine.differentiate(work)

    def capture(self, request: Any) -> Any:
        self._count()
        self.texts += len(request.prompts)
        return self._engine.capture(request)

    def _count(self) -> None:
        if self.left == 0:
            self.alive = False
            raise EngineError("the engine is gone")
        self.left = None if self.left is None else self.left - 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


@pytest.mark.parametrize("name", FITS)
def test_it_goes_on_where_it_was_ended_and_comes_to_the_same(
    name: str, lively: TransformersEngine, tmp_path: Path
) -> None:
    whole = Counted(lively)
    told: list[int] = []
    wanted = FITS[name](whole, told.append)
    path = tmp_path / "journal.jsonl"
    for share in (0.3, 0.6, None):
        counted = Counted(lively)
        again: list[int] = []

        def progress(units: int) -> None:
            again.append(units)  # noqa: B023 - called in this turn alone
            if share is not None and sum(again) > share * sum(told):  # noqa: B023
                raise Ended

        engine = JournaledEngine(counted, path)
        assert engine.begun == (share != 0.3)
        if share is None:
            found = FITS[name](engine, progress)
        else:
            with pytest.raises(Ended):
                FITS[name](engine, progress)
    assert found.sha256 == wanted.sha256
    assert sum(again) == sum(told)
    last, all_of_it = counted.pieces + counted.texts, whole.pieces + whole.texts
    assert last < all_of_it
    forget(path)
    assert not list(tmp_path.iterdir())


def test_no_piece_of_a_jacobian_lens_is_done_twice(
    lively: TransformersEngine, tmp_path: Path
) -> None:
    whole = Counted(lively)
    FITS["jacobian-lens"](whole, None)
    done, path = 0, tmp_path / "journal"
    for left in (5, 1, 9, None):
        counted = Counted(lively, left)
        try:
            FITS["jacobian-lens"](JournaledEngine(counted, path), None)
        except EngineError:
            assert left is not None
        done += counted.pieces
    assert done == whole.pieces > 15


def test_other_work_has_another_bookmark(lively: TransformersEngine, tmp_path: Path) -> None:
    path = tmp_path / "journal"
    engine = JournaledEngine(lively, path)
    Bookmark(engine, ["a", 1]).write(lambda: {"x": torch.ones(2)})
    assert torch.equal(Bookmark(engine, ["a", 1]).read()["x"], torch.ones(2))
    assert Bookmark(engine, ["a", 2]).read() == {}
    assert Bookmark(lively, ["a", 1]).read() == {}


def test_a_spoilt_bookmark_counts_as_none(lively: TransformersEngine, tmp_path: Path) -> None:
    engine = JournaledEngine(lively, tmp_path / "journal")
    Bookmark(engine, ["a"]).write(lambda: {"x": torch.ones(2)})
    (one,) = tmp_path.iterdir()
    assert [*load(one.read_bytes())] == ["x"]
    for spoilt in (b"", save({"x": torch.ones(2)})[:-3]):
        one.write_bytes(spoilt)
        assert Bookmark(engine, ["a"]).read() == {}


def test_a_mark_that_takes_long_to_write_is_rarer(
    lively: TransformersEngine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 2.0, 41.9, 42.0, 43.0])
    monkeypatch.setattr(bookmark, "_SHARE", 20)
    monkeypatch.setattr(bookmark.time, "monotonic", lambda: next(now))
    newest = Bookmark(JournaledEngine(lively, tmp_path / "journal"), ["a"])
    for value, kept in ((1, 1), (2, 1), (3, 3)):
        newest.write(lambda: {"x": torch.tensor(value)})  # noqa: B023 - called at once
        assert int(newest.read()["x"]) == kept


def test_a_mark_that_cannot_be_written_says_so(lively: TransformersEngine, tmp_path: Path) -> None:
    newest = Bookmark(JournaledEngine(lively, tmp_path / "missing" / "journal"), ["a"])
    with pytest.raises(StorageError, match="make room on the disk") as raised:
        newest.write(lambda: {"x": torch.ones(1)})
    assert str(tmp_path) not in str(raised.value)


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        yield opened


def test_a_job_goes_on_where_its_server_died(
    lively: TransformersEngine, registry: Registry, tmp_path: Path
) -> None:
    whole = Counted(lively)
    wanted = fit_jacobian_lens(whole, TEXTS, name="x", skip=3, average=2)
    job_id, done = None, 0
    for left in (3, None):
        counted = Counted(lively, left)
        runner = JobRunner(
            counted,
            registry,
            builtin_kinds(),
            QUICK,
            alive=lambda: counted.alive,  # noqa: B023
        )
        if job_id is None:
            kind = runner.kinds["fit/jacobian-lens"]
            params = kind.params.model_validate(
                {"name": "x", "prompts": TEXTS, "skip": 3, "average": 2}
            )
            job_id = runner.submit(kind.name, params).id
        runner.start()
        job = wait_for(runner, job_id, lambda one: one.finished or not counted.alive)  # noqa: B023
        runner.stop()
        done += counted.pieces
        if left is not None:
            kept = [one.name for one in (tmp_path / "registry" / "jobs").iterdir()]
            assert any(name.startswith(f"{job_id}.journal.bookmark-") for name in kept)
    assert (job.state, job.attempt) == ("succeeded", 2), job.error
    assert job.result["sha256"] == wanted.sha256
    assert done == whole.pieces > 3
    assert job.progress.done == PARTS
    left_over = {one.name for one in (tmp_path / "registry" / "jobs").iterdir()}
    assert left_over == {"files.lock", "place"}
