"""Work in a thread of its own, and that models are loaded so."""

from __future__ import annotations

import threading
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.engines.threads import apart, bound_threads
from steer.engines.transformers import engine as engines
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError


def test_work_is_done_in_another_thread_that_ends() -> None:
    thread = apart(threading.current_thread)
    assert thread is not threading.current_thread()
    thread.join()
    assert not thread.is_alive()


def test_what_work_raises_is_raised() -> None:
    error = SteerError("no such model", code="model_not_loaded")

    def fail() -> None:
        raise error

    with pytest.raises(SteerError) as caught:
        apart(fail)
    assert caught.value is error


def test_work_sees_the_callers_context() -> None:
    name = ContextVar("name", default="nobody")
    name.set("somebody")
    assert apart(name.get) == "somebody"


def test_a_model_is_loaded_and_looked_at_in_a_thread_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[threading.Thread] = []

    def load(*_given: Any, **_options: Any) -> Any:
        seen.append(threading.current_thread())
        return "checkpoint", "tokenizer"

    def built(self: Any, *_given: Any, **_options: Any) -> None:
        seen.append(threading.current_thread())
        raise SteerError("far enough", code="model_not_loaded")

    monkeypatch.setattr(engines, "load_checkpoint", load)
    monkeypatch.setattr(TransformersEngine, "__init__", built)
    with pytest.raises(SteerError, match="far enough"):
        TransformersEngine.load(tmp_path)
    [loading, building] = seen
    assert loading is building is not threading.current_thread()


def test_threads_are_bounded_for_one_thread_alone() -> None:
    before, seen = torch.get_num_threads(), {}
    torch.set_num_threads(3)

    def bounded() -> None:
        bound_threads(2)
        seen["own"] = torch.get_num_threads()

    def later() -> None:
        seen["later"] = torch.get_num_threads()

    try:
        for work in (bounded, later):
            thread = threading.Thread(target=work)
            thread.start()
            thread.join()
        assert seen == {"own": 2, "later": 3}
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)
