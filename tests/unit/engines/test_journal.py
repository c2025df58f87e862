"""What an engine was asked once it is not asked again, to the bit, also after a crash."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import (
    Captured,
    CaptureRequest,
    Completion,
    Engine,
    GenerationRequest,
    SamplingParams,
)
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.engines.journal import JournaledEngine, remembered
from steer.engines.plans import plans_of
from steer.errors import StorageError
from steer.model import HookPoint
from steer.prompts.roles import RoleRanges
from steer.spec import parse_spec

SEEDED = SamplingParams(max_tokens=4, temperature=0.7, seed=3, logprobs=2)
READ = CaptureRequest([[65, 66, 67, 68], [69, 70, 71]], logprobs=0, tail=2)


class Counted(FakeEngine):
    """Counts what it is asked for."""

    def __init__(self, *, model: str = "fake") -> None:
        super().__init__(replace(fake_model(), name=model))
        self.asked = 0

    def complete(self, requests: Sequence[GenerationRequest]) -> list[Completion]:
        self.asked += len(requests)
        return super().complete(requests)

    def capture(self, request: CaptureRequest) -> list[Captured]:
        self.asked += len(request.prompts)
        return super().capture(request)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "journal.jsonl"


def requests(sampling: SamplingParams = SEEDED) -> list[GenerationRequest]:
    return [GenerationRequest(f"r{n}", (65, 66, n), sampling) for n in range(3)]


def test_what_was_said_and_read_is_not_asked_again(path: Path) -> None:
    first = JournaledEngine(Counted(), path)
    assert not first.begun
    said, read = first.complete(requests()), first.capture(READ)
    worked_out = remembered(first, ["sum", 1], lambda: torch.tensor([0.1, 2.0]).double())

    again = JournaledEngine(engine := Counted(), path)

    assert again.begun
    assert again.complete(requests()) == said
    assert again.capture(READ) == read
    known = remembered(again, ["sum", 1], lambda: pytest.fail("it is known"))
    assert torch.equal(known, worked_out)
    assert known.dtype == torch.float64
    assert engine.asked == 0
    assert all(one.logprobs[0].top for one in said)


def test_what_was_not_asked_is(path: Path) -> None:
    JournaledEngine(Counted(), path).complete(requests()[:2])
    again = JournaledEngine(engine := Counted(), path)

    whole = again.complete(requests())

    assert engine.asked == 1
    assert [one.tokens for one in whole] == [one.tokens for one in Counted().complete(requests())]
    again.complete(requests(replace(SEEDED, seed=4)))
    again.capture(replace(READ, tail=1))
    assert engine.asked == 1 + 3 + 2
    assert torch.equal(remembered(again, ["sum", 2], lambda: torch.ones(1)), torch.ones(1))


@pytest.mark.parametrize(
    "request_of",
    [
        lambda one: replace(one, sampling=replace(SEEDED, seed=None)),
        lambda one: replace(one, stop=lambda token: False),
        lambda one: replace(one, measure=True),
    ],
    ids=["drawn anew", "stopped by a caller", "measured"],
)
def test_what_a_key_cannot_tell_is_asked_anew(path: Path, request_of) -> None:  # type: ignore[no-untyped-def]
    engine = Counted()
    asked = [request_of(one) for one in requests()]

    for _ in range(2):
        JournaledEngine(engine, path).complete(asked)

    assert engine.asked == 6


def test_states_and_logits_are_read_anew(path: Path) -> None:
    engine = Counted()
    for _ in range(2):
        JournaledEngine(engine, path).capture(CaptureRequest([[65]], (HookPoint(0),)))
        JournaledEngine(engine, path).capture(CaptureRequest([[65]], logits="last"))
    assert engine.asked == 4
    assert not path.exists()


def test_a_line_that_was_cut_off_costs_itself_alone(path: Path) -> None:
    JournaledEngine(Counted(), path).complete(requests()[:2])
    path.write_text(path.read_text()[:-5])  # by a crash
    JournaledEngine(Counted(), path).complete(requests()[2:])
    again = JournaledEngine(engine := Counted(), path)

    again.complete(requests())

    assert engine.asked == 1


def test_a_file_of_another_model_is_begun_anew(path: Path) -> None:
    JournaledEngine(Counted(), path).complete(requests())
    other = JournaledEngine(engine := Counted(model="other"), path)

    assert not other.begun
    other.complete(requests())
    assert engine.asked == 3
    assert not JournaledEngine(Counted(), path).begun


def test_an_engine_without_a_journal_works_it_out() -> None:
    engine: Engine = Counted()
    assert torch.equal(remembered(engine, ["a"], lambda: torch.ones(2)), torch.ones(2))


def test_a_disk_that_refuses_is_an_error(tmp_path: Path) -> None:
    engine = JournaledEngine(Counted(), tmp_path / "missing" / "journal.jsonl")
    with pytest.raises(StorageError) as raised:
        engine.complete(requests())
    assert raised.value.code == "storage_error"
    assert str(tmp_path) not in str(raised.value)


def test_whose_words_a_prompt_is_is_a_part_of_what_was_asked(path: Path) -> None:
    """Where the plan asks; otherwise the same words are the same request."""
    engine = Counted()
    spec = {"interventions": [{"kind": "add", "vector": "v", "layers": [1], "strength": 1}]}
    vector = ControlVector.of({1: torch.ones(engine.info.d_model)})
    plans = plans_of(engine, MemoryLibrary({"v": vector}))
    everywhere = plans.plan(parse_spec(spec))
    users = plans.plan(parse_spec({**spec, "where": {"roles": ["user"]}}))
    roles = [RoleRanges(3, ((0, n, "user"),)) for n in (1, 2)]
    journal = JournaledEngine(engine, path)
    for plan, times in (users, 2), (everywhere, 1):
        engine.asked = 0
        for whose in (*roles, *roles):
            journal.complete([GenerationRequest("r", (65, 66, 67), SEEDED, plan, roles=whose)])
        assert engine.asked == times
        engine.asked = 0
        for whose in (*roles, *roles):
            journal.capture(replace(READ, prompts=[[65, 66, 67]], plans=[plan], roles=[whose]))
        assert engine.asked == times


def test_a_part_of_a_capture_has_its_own_plans_and_roles() -> None:
    request = CaptureRequest([[1], [2], [3]], plans=["a", "b", "c"], roles=["x", "y", "z"])  # type: ignore[list-item]
    part = request.of([2, 0])
    assert (part.prompts, part.plans, part.roles) == ([[3], [1]], ["c", "a"], ["z", "x"])
    assert READ.of([1]) == replace(READ, prompts=[READ.prompts[1]])
