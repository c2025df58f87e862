"""Read-outs taken off the engine's outputs before vLLM sees them."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.engines.vllm.messages import Arrival, put_readouts_on
from steer.errors import EngineError
from steer_server.vllm.fetching.arrived_readouts import ArrivedReadouts

WIDTH = 2


class OutputProcessor:
    """vLLM's, as far as it is known here: notes what it is given."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def process_outputs(self, engine_core_outputs: list[Any], stamp: float = 0.0) -> float:
        self.seen += [output.kv_transfer_params for output in engine_core_outputs]
        return stamp


def numbers(position: int) -> tuple[float, ...]:
    return (float(position), -float(position))


def output(key: str, start: int, fed: int, **theirs: Any) -> Any:
    """What tells of the tokens from `start` to `fed`."""
    made = SimpleNamespace(kv_transfer_params=theirs or None)
    rows = np.array([numbers(n) for n in range(start, fed)], dtype=np.float32)
    answer = {"positions": list(range(start, fed)), "numbers": rows.tobytes()}
    put_readouts_on(made, Arrival(key, fed, [answer]))
    return made


def watching() -> tuple[ArrivedReadouts, OutputProcessor]:
    arrived, processor = ArrivedReadouts(), OutputProcessor()
    arrived.watch(processor)
    return arrived, processor


def rows(*positions: int) -> list[tuple[int, tuple[float, ...]]]:
    return [(n, numbers(n)) for n in positions]


def test_vllm_sees_its_own_outputs() -> None:
    _, processor = watching()
    plain = SimpleNamespace(kv_transfer_params={"theirs": 1})
    outputs = [output("a", 0, 3), plain, output("b", 0, 1, theirs=2)]
    assert processor.process_outputs(outputs, 1.5) == 1.5
    assert processor.seen == [None, {"theirs": 1}, {"theirs": 2}]


def test_each_row_is_taken_once_when_its_token_is_known() -> None:
    """Two outputs may have come before the first is handed on, or be handed on as one."""
    arrived, processor = watching()
    arrived.expect("a")
    assert arrived.take("a", 3, WIDTH) is None
    processor.process_outputs([output("a", 0, 3), output("b", 0, 3)])
    processor.process_outputs([output("a", 3, 5)])
    assert arrived.take("a", 3, WIDTH) == rows(0, 1, 2)
    assert arrived.take("a", 5, WIDTH) == rows(3, 4)
    assert arrived.take("a", 5, WIDTH) == []
    assert arrived.take("a", 6, WIDTH) is None


@given(st.lists(st.integers(1, 3), min_size=1), st.data())
def test_nothing_is_lost_or_told_twice(steps: list[int], data: st.DataObject) -> None:
    arrived, processor = watching()
    arrived.expect("a")
    fed, heard, told = 0, 0, []
    for step in steps:
        processor.process_outputs([output("a", fed, fed + step)])
        fed += step
        heard = data.draw(st.integers(heard, fed))
        told += arrived.take("a", heard, WIDTH) or []
        assert told == rows(*range(heard))


def test_what_nobody_expects_is_dropped() -> None:
    arrived, processor = watching()
    processor.process_outputs([output("a", 0, 3)])
    arrived.expect("a")
    assert arrived.take("a", 3, WIDTH) is None
    arrived.forget("a")
    processor.process_outputs([output("a", 0, 3)])
    arrived.expect("a")
    assert arrived.take("a", 3, WIDTH) is None


def test_what_could_not_be_read_is_raised_where_it_is_taken() -> None:
    arrived, processor = watching()
    arrived.expect("a")
    failed = SimpleNamespace(kv_transfer_params=None)
    put_readouts_on(failed, Arrival("a", 3, [{"error": "why", "code": "readouts_missed"}]))
    processor.process_outputs([failed])
    with pytest.raises(EngineError, match="why"):
        arrived.take("a", 3, WIDTH)
