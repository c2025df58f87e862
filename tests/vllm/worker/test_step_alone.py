"""The benchmarks' model of taps alone is still what the worker's adapter takes for a runner."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks.vllm import instructions
from benchmarks.vllm.diets import DIETS, TRIGGERED, Diet
from benchmarks.vllm.overhead import StepAlone, planned
from benchmarks.vllm.shapes import CAPABILITIES, SHAPES, Shape, library
from benchmarks.vllm.steps.around_kernels import WATCHING, Kernels
from steer.plan.cache import PlanCache

SMALL = Shape("small", d_model=16, layers=4, heads=2, ffn=32, vocabulary=64)
PLANS = PlanCache(library(SMALL), SMALL.info(), CAPABILITIES)
BATCH = 20


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("diet", DIETS, ids=lambda one: one.name)
@torch.inference_mode()
def test_every_diet_decodes(diet: Diet, compiled: bool) -> None:
    wanted = planned(PLANS, diet.batch(SMALL, BATCH))
    alone = StepAlone(SMALL, wanted, compiled=compiled)
    alone.begin()
    for _ in range(3):
        alone.prepare()
        assert len(alone.step()) == 3
    alone.check()


@pytest.mark.parametrize("diet", [*DIETS, *WATCHING], ids=lambda one: one.name)
@torch.inference_mode()
def test_every_diet_decodes_around_kernels(diet: Diet) -> None:
    wanted = planned(PLANS, diet.batch(SMALL, BATCH))
    kernels = Kernels(SMALL)
    alone = StepAlone(SMALL, wanted, compiled=True, edits=kernels.edits, taps=kernels.taps)
    alone.begin()
    for _ in range(3):
        alone.prepare()
        alone.step()
    alone.check()


class Listed:
    """A switch that notes what it is told."""

    def __init__(self) -> None:
        self.on = False
        self.steps = 0
        self.dumps: list[tuple[int, str]] = []

    def resume(self) -> None:
        self.on = True

    def pause(self) -> None:
        self.steps += self.on
        self.on = False

    def dump(self, name: str) -> None:
        assert not self.on
        self.dumps.append((self.steps, name))
        self.steps = 0


def test_instructions_are_counted_of_steps_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(SHAPES, "small", SMALL)
    switch, asked = Listed(), {"shape": "small", "batches": [2], "compiled": False}
    instructions.count(switch, {**asked, "cold": False, "diets": None})
    assert [steps for steps, _ in switch.dumps] == [instructions.STEPS] * len(DIETS)
    assert [json.loads(told)["diet"] for _, told in switch.dumps] == [one.name for one in DIETS]
    switch.dumps = []
    instructions.count(switch, {**asked, "cold": True, "diets": [TRIGGERED.name]})
    taps = 2 * SMALL.layers + 1
    begun = [instructions.STEPS, instructions.COLD_STEPS * (taps + 1)]
    assert [steps for steps, _ in switch.dumps] == begun
