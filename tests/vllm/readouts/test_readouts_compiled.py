"""Read-outs of an engine that compiles its model: beside requests that read nothing, and with
divergences."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from readout_crowd import (
    assert_all_compared,
    assert_all_read,
    compared,
    crowd,
    forgotten,
    reading_engine,
)

from steer.engines.vllm.front.engine import VllmEngine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    with reading_engine(tmp_path_factory.mktemp("registry"), enforce_eager=False) as running:
        yield running


def test_a_crowd_is_read_as_a_capture_reads_it(engine: VllmEngine) -> None:
    asked = crowd(engine, 40)
    answers = engine.complete([one.request for one in asked])
    assert_all_read(engine, asked, answers)
    assert forgotten(engine)


def test_divergences_are_those_of_two_offline_passes(engine: VllmEngine) -> None:
    asked = compared(engine, crowd(engine, 24))
    answers = engine.complete(asked)
    assert_all_compared(engine, asked, answers)
    assert forgotten(engine)
