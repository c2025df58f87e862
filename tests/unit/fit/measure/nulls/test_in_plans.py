"""The vector that a plan adds, and another one in its place."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import Unsupported
from steer.fit.measure.nulls.in_plans import added_vector, with_vector
from steer.model import HookPoint
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec


def randn(seed: int) -> torch.Tensor:
    return torch.randn(32, generator=torch.Generator().manual_seed(seed))


LIBRARY = MemoryLibrary(
    {
        "a": ControlVector.of({0: randn(0), 1: randn(1)}, name="a"),
        "b": ControlVector.of({1: randn(2)}, name="b"),
    }
)
A, B = ({"kind": "add", "vector": name, "strength": 1.5} for name in "ab")
POINTS = (HookPoint(1), HookPoint(2))


def plan_of(engine: TransformersEngine, *items: Any, **spec: Any) -> SteeringPlan:
    return plans_of(engine, LIBRARY).plan(parse_spec({"interventions": list(items), **spec}))


def states(engine: TransformersEngine, plan: SteeringPlan) -> torch.Tensor:
    [found] = engine.capture(CaptureRequest([[5, 6, 7, 8]], POINTS, plans=[plan]))
    return torch.stack([found.states[point] for point in POINTS])


ADDING: list[Any] = [
    ([A], {}),
    ([A, B], {}),
    ([A], {"norm": "preserve"}),
    ([A], {"where": {"positions": [[-1, None]]}}),
    ([{**A, "strength": {"norm": 0.2}}], {}),
    ([{**A, "strength": {"norm": -0.2}, "layers": [1]}], {"norm": "preserve"}),
]


@pytest.mark.parametrize(("items", "spec"), ADDING)
def test_the_plan_with_its_own_vector_is_the_plan(
    engine: TransformersEngine, items: Any, spec: Any
) -> None:
    plan = plan_of(engine, *items, **spec)
    vector = added_vector(plan)
    again = with_vector(plan, vector, 1.0)
    assert again.fingerprint != plan.fingerprint
    assert torch.allclose(states(engine, again), states(engine, plan), atol=1e-5)
    assert not torch.equal(states(engine, with_vector(plan, vector, 0.5)), states(engine, plan))


def test_the_sum_of_what_is_added(engine: TransformersEngine) -> None:
    found = added_vector(plan_of(engine, A, B))
    assert found.card.layers == (0, 1)
    assert torch.allclose(found[0], 1.5 * randn(0))
    assert torch.allclose(found[1], 1.5 * (randn(1) + randn(2)))


def test_strength_is_that_of_the_spec(engine: TransformersEngine) -> None:
    plan = plan_of(engine, A)
    double = plan_of(engine, {**A, "strength": 3.0})
    assert torch.allclose(
        states(engine, with_vector(plan, LIBRARY.vector("a"), 3.0)), states(engine, double)
    )


@pytest.mark.parametrize(
    ("items", "why"),
    [
        ([{**A, "strength": 0.0}], "adds nothing"),
        ([{"kind": "ablate", "vector": "a"}], "more than to add"),
        ([A, {**B, "where": {"phases": ["generation"]}}], "several kinds of tokens"),
        ([{**A, "layers": [1], "when": {"vector": "b", "above": 0.1}}], "behind a gate"),
        ([{**A, "layers": [0]}, {**B, "strength": {"norm": 0.1}}], "shares of the norm"),
    ],
)
def test_what_does_not_add_a_vector_has_no_nulls(
    engine: TransformersEngine, items: Any, why: str
) -> None:
    with pytest.raises(Unsupported, match=why) as caught:
        added_vector(plan_of(engine, *items))
    assert caught.value.code == "no_nulls"
