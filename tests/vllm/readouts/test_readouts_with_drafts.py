"""Read-outs of an engine that speculates: a drafted token that stays is read as what it is, and one
that does not stay is read by nobody."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
from readout_crowd import (
    Asked,
    assert_all_compared,
    assert_all_read,
    compared,
    crowd,
    forgotten,
    reading_engine,
)
from vllm_speculation import NGRAM, counted_drafts

from steer.engines.vllm.front.engine import VllmEngine


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    with reading_engine(tmp_path_factory.mktemp("registry"), speculative_config=NGRAM) as running:
        yield running


def repeating(engine: VllmEngine, count: int) -> list[Asked]:
    """A crowd of which half say everything twice, so that drafts come from their prompts."""
    return [
        replace(one, request=replace(one.request, prompt=(one.request.prompt * 2)[:80]))
        if n % 2
        else one
        for n, one in enumerate(crowd(engine, count))
    ]


def test_a_crowd_is_read_as_a_capture_reads_it(engine: VllmEngine) -> None:
    asked = repeating(engine, 40)
    with counted_drafts(engine) as drafts:
        answers = engine.complete([one.request for one in asked])
    assert_all_read(engine, asked, answers)
    assert drafts.total.accepted >= 20
    assert drafts.total.drafted - drafts.total.accepted >= 20
    assert forgotten(engine)


def test_divergences_are_those_of_two_offline_passes(engine: VllmEngine) -> None:
    asked = compared(engine, repeating(engine, 24))
    with counted_drafts(engine) as drafts:
        answers = engine.complete(asked)
    assert_all_compared(engine, asked, answers)
    assert drafts.total.accepted > 0
    assert forgotten(engine)
