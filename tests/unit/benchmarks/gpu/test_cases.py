"""Cases that are kept as they are done: going on, failing, and stopping in time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.gpu.cases import Case, Progress, Result, results, run_cases
from benchmarks.gpu.device import Host, NoDevice, device
from benchmarks.kept import Kept

NEVER = float("inf")


class Script:
    """Cases that note when they run, of which some fail."""

    def __init__(self, *failing: str) -> None:
        self.ran: list[str] = []
        self.failing = set(failing)

    def cases(self) -> Iterator[Case]:
        for name in ("part/a", "part/b", "part/c"):
            yield Case(name, lambda name=name: self.run(name))

    def run(self, name: str) -> Result:
        self.ran.append(name)
        if name in self.failing:
            raise ValueError(f"{name} is broken")
        return {"found": name}


@pytest.fixture
def kept(tmp_path: Path) -> Kept:
    return Kept(tmp_path / "gpu.json", {}, {})


def test_what_has_a_result_is_not_run_again(kept: Kept) -> None:
    script = Script()
    kept.keep("part/b", {"found": "before"})
    assert run_cases(kept, script.cases(), Host(), limit_seconds=NEVER) == Progress(3, 0, 0)
    assert script.ran == ["part/a", "part/c"]
    assert dict(results(kept, "part"))["b"] == {"found": "before"}


def test_a_case_that_fails_is_tried_once_more_and_the_others_go_on(kept: Kept) -> None:
    script = Script("part/b")
    assert run_cases(kept, script.cases(), Host(), limit_seconds=NEVER) == Progress(2, 0, 1)
    assert run_cases(kept, script.cases(), Host(), limit_seconds=NEVER) == Progress(2, 1, 0)
    assert run_cases(kept, script.cases(), Host(), limit_seconds=NEVER) == Progress(2, 1, 0)
    assert script.ran == ["part/a", "part/b", "part/c", "part/b"]
    assert kept["part/b"] == {"error": "ValueError: part/b is broken", "tries": 2}


def test_a_case_that_takes_the_process_with_it_is_known_by_that(kept: Kept) -> None:
    def die() -> Result:
        raise KeyboardInterrupt

    for tries in (1, 2):
        with pytest.raises(KeyboardInterrupt):
            run_cases(kept, [Case("part/a", die)], Host(), limit_seconds=NEVER)
        assert kept["part/a"] == {"error": "it was cut off", "tries": tries}
    assert run_cases(kept, [Case("part/a", die)], Host(), limit_seconds=NEVER).failed == 1


def test_no_case_begins_when_the_time_is_over(kept: Kept) -> None:
    script, now = Script(), iter([0.0, 1.0, 2.0, 3.0])
    found = run_cases(kept, script.cases(), Host(), limit_seconds=3.0, clock=lambda: next(now))
    assert found == Progress(2, 0, 1)
    assert script.ran == ["part/a", "part/b"]
    assert "part/c" not in kept


class Lost(Host):
    def wait(self) -> None:
        raise RuntimeError("an illegal memory access")


def test_a_lost_device_ends_the_run_and_the_next_one_goes_on(kept: Kept) -> None:
    script = Script()
    with pytest.raises(RuntimeError, match="run the same command again"):
        run_cases(kept, script.cases(), Lost(), limit_seconds=NEVER)
    assert script.ran == ["part/a"]
    assert run_cases(kept, script.cases(), Host(), limit_seconds=NEVER) == Progress(3, 0, 0)


def test_a_device_that_is_not_there_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(NoDevice, match=r"sees no CUDA device here: run this on a host with"):
        device("cuda")
    with pytest.raises(NoDevice, match="'tpu': choose cuda"):
        device("tpu")
