"""Strengths of equal KL: found in few reads, shared by all, and honest where there is none."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.measure.answers import Answer, answers_under
from steer.fit.measure.divergence import References, divergences
from steer.fit.measure.nulls.matching import matched_strength, matched_strengths
from steer.fit.measure.scoring import Score
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

CURVES: dict[str, Callable[[float], float]] = {
    "square": lambda s: 0.3 * s**2,
    "steep": lambda s: 40 * s**2,
    "flat": lambda s: 1e-5 * s**2,
    "bent": lambda s: 3 * s**2 / (1 + s) ** 1.5,
    "sudden": lambda s: 0.001 * s if s < 2 else 0.002 + 2 * (s - 2),
    "saturating": lambda s: 2 * s**2 / (1 + s**2),
}


class Curves:
    """References whose plans are (name, strength), with a curve for each name."""

    def __init__(self) -> None:
        self.reads: list[list[tuple[str, float]]] = []

    def divergences(self, plans: Sequence[tuple[str, float]]) -> torch.Tensor:
        self.reads.append(list(plans))
        return torch.tensor([[CURVES[name](strength)] for name, strength in plans])


def plan_at(name: str) -> Any:
    return lambda strength: (name, strength)


@pytest.mark.parametrize("name", CURVES)
@pytest.mark.parametrize("start", [0.05, 1.0, 30.0])
def test_the_kl_is_had_within_tolerance(name: str, start: float) -> None:
    curves = Curves()
    found = matched_strength(
        cast("References", curves), plan_at(name), 0.8, start=start, most_reads=14
    )
    assert found.reached
    assert found.kl == pytest.approx(0.8, rel=0.05)
    assert found.kl == pytest.approx(CURVES[name](found.strength))
    assert found.reads == len(curves.reads)


def test_from_near_it_takes_two_or_three_reads() -> None:
    curves = Curves()
    found = matched_strengths(
        cast("References", curves),
        [plan_at("square"), plan_at("bent"), plan_at("saturating")],
        [0.8, 0.8, 0.8],
        start=[1.0, 1.0, 1.0],
    )
    assert [one.reads for one in found] == [2, 3, 3]
    # Those that are done are not read again, and the others share their reads.
    assert [len(together) for together in curves.reads] == [3, 3, 2]


def test_what_saturates_says_so() -> None:
    curves = Curves()
    told: list[int] = []
    far, near = matched_strengths(
        cast("References", curves),
        [plan_at("saturating"), plan_at("square")],
        [5.0, 5.0],
        start=[1.0, 1.0],
        most_reads=6,
        progress=told.append,
    )
    assert (far.reached, far.reads) == (False, 6)
    assert 1.9 < far.kl < 2
    assert near.reached
    assert sum(told) == 2


def test_no_kl_is_no_strength() -> None:
    curves = Curves()
    found = matched_strength(cast("References", curves), plan_at("square"), 0.0)
    assert (found.strength, found.kl, found.reached) == (0.0, 0.0, True)
    assert curves.reads == []


@pytest.fixture(scope="module")
def answers(lively: TransformersEngine) -> tuple[Answer, ...]:
    sampling = SamplingParams(max_tokens=6, temperature=0, logprobs=0, ignore_eos=True)
    [found] = answers_under(
        lively, [["one", "two words", "three"]], [None], lambda _: Score(0.0), sampling=sampling
    )
    return found


def plans(engine: TransformersEngine, seed: int) -> Callable[[float], SteeringPlan]:
    row = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    cache = plans_of(engine, MemoryLibrary({"v": ControlVector.of({1: row}, name="v")}))

    def plan(strength: float) -> SteeringPlan:
        item = {"kind": "add", "vector": "v", "strength": strength}
        return cache.plan(parse_spec({"interventions": [item]}))

    return plan


def test_vectors_of_a_model_are_matched(
    lively: TransformersEngine, answers: tuple[Answer, ...]
) -> None:
    references = References(lively, answers)
    target = float(references.divergences([plans(lively, 0)(1.0)]).mean())
    vectors = [plans(lively, seed) for seed in (1, 2, 3)]
    found = matched_strengths(references, vectors, [target] * 3, start=[1.0] * 3)
    assert all(one.reached for one in found)
    checked = divergences(
        lively, answers, [plan(m.strength) for plan, m in zip(vectors, found, strict=True)]
    )
    assert checked.mean(1).tolist() == pytest.approx([one.kl for one in found], rel=1e-3)
    assert checked.mean(1).tolist() == pytest.approx([target] * 3, rel=0.05)


@pytest.mark.parametrize("room", [0, 1 << 12, 1 << 30])
def test_unsteered_answers_are_read_once_and_plans_share_batches(
    lively: TransformersEngine, answers: tuple[Answer, ...], room: int
) -> None:
    reads: list[int] = []

    def capture(request: CaptureRequest) -> Any:
        reads.append(len(request.prompts))
        return lively.capture(request)

    engine: Any = SimpleNamespace(capture=capture)
    references = References(engine, answers, batch=4, room=room)
    three = [plans(lively, seed)(1.0) for seed in (1, 2, 3)]
    first, again = (references.divergences(three) for _ in range(2))
    assert torch.equal(first, again)
    assert torch.allclose(first, divergences(lively, answers, three), rtol=1e-4)
    # Three answers under three plans, four at once; with room, unsteered only the first time.
    unsteered = {0: 2, 1 << 12: 2, 1 << 30: 1}[room]
    assert sum(reads) == unsteered * 3 + 2 * 9
    assert max(reads) == 4
    # A part of the answers needs no more unsteered reads, and has the KL of its tokens.
    part = references.first(2, 3)
    shorter = [Answer(one.prompt, one.tokens[:3], "") for one in answers[:2]]
    before = sum(reads)
    found = part.divergences(three[:1])
    assert torch.allclose(found, divergences(lively, shorter, three[:1]), rtol=1e-4)
    assert sum(reads) - before == 2 + (0 if room == 1 << 30 else 2)
