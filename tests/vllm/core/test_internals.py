"""The internals of the installed vLLM are those that Steer knows, or are told of one by one."""

from __future__ import annotations

import pytest
from vllm.v1.core.sched.scheduler import Scheduler

from steer.engines.vllm import internals
from steer.engines.vllm.seams import check
from steer.errors import Unsupported


def test_nothing_has_moved(capsys: pytest.CaptureFixture[str]) -> None:
    moved = internals.main()
    assert moved == 0, capsys.readouterr().out


def test_all_that_has_moved_is_told_at_once(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(Scheduler, "schedule", lambda self: None)
    monkeypatch.delattr(Scheduler, "finish_requests")
    assert internals.main() == 2
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split(" ")[:2] for line in lines] == [
        ["vllm/v1/core/sched/scheduler.py:", "Scheduler.schedule"],
        ["vllm/v1/core/sched/scheduler.py:", "Scheduler.finish_requests"],
    ]
    with pytest.raises(Unsupported, match=r"in vLLM \d") as refused:
        check(*internals.SCHEDULER)
    assert all(line in refused.value.message for line in lines)
