"""One text under many plans: what is below all of them is computed once, if the model allows it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import random_vector
from tiny_families import FAMILIES, build_family
from tiny_models import LAYERS, WIDTH, tiny_tokenizer
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Captured, CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.structure.blocks import find_hook_points
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

PROMPT = tuple(range(3, 20))
LAST = HookPoint(LAYERS - 1)
LIBRARY = MemoryLibrary({"v": random_vector(1, *range(LAYERS), width=WIDTH)})
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 3e-2}


def plan(
    engine: TransformersEngine, layer: int, strength: float, when: dict[str, Any] | None = None
) -> SteeringPlan:
    add: dict[str, Any] = {"kind": "add", "vector": "v", "layers": [layer], "strength": strength}
    if when is not None:
        add["when"] = when
    cache = PlanCache(LIBRARY, engine.info, engine.capabilities)
    return cache.plan(parse_spec({"interventions": [add]}))


def plans(engine: TransformersEngine, *layers: int) -> list[SteeringPlan]:
    return [plan(engine, layer, 0.5 + n) for n, layer in enumerate(layers)]


def read(
    engine: TransformersEngine, given: list[SteeringPlan | None], **asked: Any
) -> list[Captured]:
    options: dict[str, Any] = {"points": (LAST,), "logits": "all", **asked}
    return engine.capture(CaptureRequest([PROMPT] * len(given), plans=given, **options))


def assert_same(found: list[Captured], wanted: list[Captured], tolerance: float) -> None:
    for one, other in zip(found, wanted, strict=True):
        assert one.states.keys() == other.states.keys()
        pairs = [
            (one.logits, other.logits),
            *((one.states[p], other.states[p]) for p in one.states),
        ]
        for mine, alone in pairs:
            assert mine is not None
            assert alone is not None
            assert (mine - alone).abs().max() <= tolerance * alone.abs().max()


class Count:
    """The rows that a block has computed."""

    def __init__(self, block: nn.Module) -> None:
        self.rows = 0
        forward = block.forward

        def counted(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            self.rows += len(states)
            return forward(states, *args, **kwargs)

        block.forward = counted


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", sorted(FAMILIES.keys() - {"gpt1"}))  # which keeps no cache
def test_each_equals_itself_alone(name: str, dtype: torch.dtype) -> None:
    model = build_family(name, dtype)
    with TransformersEngine(model, tiny_tokenizer(), rows=4, slots=8) as engine:
        given: list[SteeringPlan | None] = [*plans(engine, 2, 1, 2, 1, 2, 2), None]
        alone = [read(engine, [one])[0] for one in given]
        assert_same(read(engine, given), alone, TOLERANCE[dtype])


def test_plans_that_do_nothing_are_read_beside_others() -> None:
    model = build_family("llama")
    with TransformersEngine(model, tiny_tokenizer(), rows=8, slots=8) as engine:
        given: list[SteeringPlan | None] = [plan(engine, 2, float(n)) for n in range(4)]
        alone = [read(engine, [one])[0] for one in given]
        assert_same(read(engine, given), alone, TOLERANCE[torch.float32])


@pytest.mark.parametrize("scope", ["prompt", "token", "onward"])
@pytest.mark.parametrize("layer", [0, 1])
def test_a_gate_below_the_first_edit_reads_every_row(scope: str, layer: int) -> None:
    """Half of them open, and each for its own reason."""
    model = build_family("llama")
    with TransformersEngine(model, tiny_tokenizer(), rows=8, slots=8) as engine:
        gate = {"vector": "v", "layer": layer, "scope": scope}
        given: list[SteeringPlan | None] = [
            plan(engine, LAYERS - 1, 1.0 + n, {**gate, "above": -1.0 if n % 2 else 0.99 + n / 1000})
            for n in range(6)
        ]
        alone = [read(engine, [one])[0] for one in given]
        closed, opened = (alone[n].states[LAST] for n in (0, 1))
        assert not torch.equal(closed, opened)
        assert_same(read(engine, given), alone, TOLERANCE[torch.float32])


def test_blocks_below_the_first_edit_run_for_one_row() -> None:
    model = build_family("llama")
    with TransformersEngine(model, tiny_tokenizer(), rows=8, slots=8) as engine:
        below, above = (Count(model.get_submodule(f"model.layers.{n}")) for n in (1, 2))
        read(engine, [*plans(engine, 2, 2, 2)])  # and the trial
        before = below.rows, above.rows
        read(engine, [*plans(engine, 2, 2, 2, 2, 2)])
        assert below.rows - before[0] == 1
        assert above.rows - before[1] == 5


@pytest.mark.parametrize(
    ("layers", "asked"),
    [
        ((2, 2), {}),  # too few to be worth it
        ((0, 2, 2), {}),
        ((2, 2, 2), {"points": (HookPoint(0), LAST)}),
    ],
)
def test_what_reaches_the_first_block_runs_whole(
    layers: tuple[int, ...], asked: dict[str, Any]
) -> None:
    model = build_family("llama")
    with TransformersEngine(model, tiny_tokenizer(), rows=8, slots=8) as engine:
        given: list[SteeringPlan | None] = [*plans(engine, *layers)]
        alone = [read(engine, [one], **asked)[0] for one in given]
        count = Count(model.get_submodule("model.layers.0"))
        assert_same(read(engine, given, **asked), alone, TOLERANCE[torch.float32])
        assert count.rows == len(layers)


class _Remembers(LlamaForCausalLM):  # type: ignore[no-untyped-call]
    """Its last block adds what its first was given, which it keeps to itself."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        first, last = self.model.layers[0], self.model.layers[-1]
        kept: list[Tensor] = []
        forward, keeping = first.forward, last.forward

        def keep(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            kept[:] = [states]
            return forward(states, *args, **kwargs)

        def recall(states: Tensor, *args: Any, **kwargs: Any) -> Any:
            return keeping(states + kept[0], *args, **kwargs)

        first.forward, last.forward = keep, recall


def test_a_model_whose_blocks_share_more_than_the_stream_runs_whole() -> None:
    model: nn.Module = _Remembers(build_family("llama").config).eval()  # type: ignore[arg-type]
    with TransformersEngine(model, tiny_tokenizer(), rows=8, slots=8) as engine:
        given: list[SteeringPlan | None] = [*plans(engine, 2, 2, 2)]
        alone = [read(engine, [one])[0] for one in given]
        assert_same(read(engine, given), alone, TOLERANCE[torch.float32])


def test_a_trial_that_fails_is_no_reason_to_fail() -> None:
    model = build_family("llama")
    stem = find_hook_points(model, "llama").stem

    def fails() -> Tensor:
        raise KeyError("shared keys")

    assert not stem.serves(1, lambda: torch.zeros(2), fails)
    assert not stem.serves(1, lambda: torch.zeros(2), lambda: torch.zeros(2)), "found out once"
