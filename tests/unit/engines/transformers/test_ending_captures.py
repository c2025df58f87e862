"""A capture runs the model as far as it reads, and reads what a whole pass has."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tiny_models import byte_model

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import ByteTokenizer
from steer.engines.transformers.engine import TransformersEngine
from steer.model import HookPoint
from steer.plan.compiler import compile_plan
from steer.plan.plan import SteeringPlan
from steer.plan.sources import Sources
from steer.spec import parse_spec

TEXTS = [[65 + n % 20 for n in range(start, start + 7 + start)] for start in range(5)]


@pytest.fixture
def model() -> Any:
    return byte_model(initializer_range=0.2)


@pytest.fixture
def engine(model: Any) -> Iterator[TransformersEngine]:
    with TransformersEngine(model, ByteTokenizer(), name="tiny", rows=8, slots=8) as running:
        yield running


def blocks_run(model: Any) -> list[int]:
    """Filled with the number of each block that is run from now on."""
    run: list[int] = []
    for number, block in enumerate(model.model.layers):
        block.register_forward_pre_hook(lambda *_args, number=number: run.append(number))
    return run


def plan(engine: TransformersEngine, layer: int) -> SteeringPlan:
    vector = ControlVector.of({layer: torch.ones(engine.info.d_model)}, name="v")
    spec = parse_spec({"interventions": [{"kind": "add", "vector": "v", "strength": 3.0}]})
    sources = Sources(MemoryLibrary(vectors={"v": vector}), engine.info)
    return compile_plan(spec, sources, engine.capabilities)


@pytest.mark.parametrize(
    "point", [HookPoint(0), HookPoint(1, "mlp_out"), HookPoint(1), HookPoint(2)]
)
def test_blocks_after_the_last_state_are_not_run(
    engine: TransformersEngine, model: Any, point: HookPoint
) -> None:
    whole = engine.capture(CaptureRequest(TEXTS, (point,), logits="last"))
    run = blocks_run(model)
    read = engine.capture(CaptureRequest(TEXTS, (point,)))
    assert max(run) == point.layer
    for one, other in zip(read, whole, strict=True):
        assert torch.equal(one.states[point], other.states[point])


def test_what_steers_on_the_way_still_acts(engine: TransformersEngine, model: Any) -> None:
    point = HookPoint(1)
    plans = [plan(engine, 0), None, plan(engine, 1), plan(engine, 2), None]
    whole = engine.capture(CaptureRequest(TEXTS, (point,), plans=plans, logits="last"))
    run = blocks_run(model)
    read = engine.capture(CaptureRequest(TEXTS, (point,), plans=plans))
    # One of the plans edits the last block, after the state that is read.
    assert max(run) == 2
    for one, other in zip(read, whole, strict=True):
        assert torch.equal(one.states[point], other.states[point])
    run.clear()
    engine.capture(CaptureRequest(TEXTS[:2], (point,), plans=plans[:2]))
    assert max(run) == 1


def test_the_next_pass_is_a_whole_one(engine: TransformersEngine, model: Any) -> None:
    run = blocks_run(model)
    engine.capture(CaptureRequest(TEXTS, (HookPoint(0),)))
    run.clear()
    [first, *_] = engine.capture(CaptureRequest(TEXTS, logits="all"))
    assert max(run) == 2
    assert first.logits is not None
    with torch.inference_mode():
        wanted = model(torch.tensor([TEXTS[0]])).logits
    torch.testing.assert_close(first.logits, wanted[0], rtol=1e-4, atol=1e-4)
