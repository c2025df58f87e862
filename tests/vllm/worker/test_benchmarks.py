"""The engine that benchmarks step by hand, on a model of a few thousand weights."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from benchmarks.vllm.diets import DIETS, READING, TRIGGERED, Diet
from benchmarks.vllm.shapes import Shape, register
from benchmarks.vllm.worker import Engine
from steer.registry.registry import Registry

SMALL = Shape("small", d_model=64, layers=4, heads=2, ffn=32, vocabulary=64)
BATCH, TOKENS = 3, 4
PROMPTS = [[5, 6, 7, 8 + n] for n in range(BATCH)]


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Engine:
    folder = tmp_path_factory.mktemp("benchmark")
    os.environ.update(STEER_REGISTRY=str(folder / "registry"), VLLM_PLUGINS="steer")
    with Registry.open(folder / "registry") as registry:
        register(registry, SMALL)
    return Engine(str(SMALL.model(Path(folder))), steered=True, eager=True)


@pytest.mark.parametrize(
    "diet", [one for one in DIETS if one is not TRIGGERED], ids=lambda one: one.name
)
def test_every_diet_is_steered_as_it_is_timed(engine: Engine, diet: Diet) -> None:
    specs = diet.batch(SMALL, BATCH)
    engine.start(specs, PROMPTS, TOKENS)
    assert len(engine.steps(TOKENS - 1)) == TOKENS - 1
    steered = engine.finish()
    asked = sum(spec is not None for spec in specs)
    assert steered == asked * (len(PROMPTS[0]) + TOKENS - 1)


@pytest.mark.parametrize("diet", READING, ids=lambda one: one.name)
def test_what_is_read_comes_with_every_step_that_is_timed(engine: Engine, diet: Diet) -> None:
    assert diet.inspect is not None
    engine.start(diet.batch(SMALL, BATCH), PROMPTS, TOKENS, diet.inspect(SMALL))
    engine.steps(TOKENS - 1)
    assert engine.finish() == 0
    engine.start([None] * BATCH, PROMPTS, TOKENS, diet.inspect(SMALL))
    engine.steps(1)
    [(ticket, length), *_] = engine._asked.values()
    assert ticket is not None
    assert engine._reads is not None
    engine._arrived.take(ticket.key, length + 1, engine._reads.width)  # and is missed at the end
    with pytest.raises(RuntimeError, match=f"{TOKENS - 2} tokens of {TOKENS - 1} tokens were read"):
        engine.finish()
    engine.start([None] * BATCH, PROMPTS, TOKENS)
    assert engine.finish() == 0


def test_a_whole_job_gives_the_same_tokens_each_time(engine: Engine) -> None:
    specs = DIETS[1].batch(SMALL, BATCH)
    (_, first), (_, second) = (engine.chats(specs, PROMPTS, TOKENS) for _ in range(2))
    assert first == second
    assert [len(one) for one in first] == [TOKENS] * BATCH
