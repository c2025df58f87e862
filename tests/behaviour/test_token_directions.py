"""A token's direction makes the demo model say it, keeps it from it, or puts another there."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import random_lens
from torch import Tensor

from steer.artefacts.lens import Lens
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.model import HookPoint
from steer.prompts import text_tokens
from steer.spec import parse_spec

MODEL = Path(__file__).parents[2] / "vectors" / "demo" / "model"
CAPITALS = {"France": " Paris", "Spain": " Madrid", "Germany": " Berlin", "Italy": " Rome"}
LAYER = 3
LENSES = {"tuned": random_lens(3, 6, 192)}


@pytest.fixture(scope="module")
def demo() -> Iterator[TransformersEngine]:
    with TransformersEngine.load(str(MODEL)) as engine:
        yield engine


def read(engine: TransformersEngine, *items: dict[str, Any] | None) -> tuple[Tensor, Tensor]:
    """Next-token logits and the last token's states at `LAYER`, for each capital under its item."""
    plans = plans_of(engine, MemoryLibrary(lenses=LENSES))
    compiled = [one and plans.plan(parse_spec({"interventions": [one]})) for one in items]
    prompts = [
        tuple(text_tokens(engine.tokenizer, f"The capital of {country} is")) for country in CAPITALS
    ]
    point = HookPoint(LAYER)
    request = CaptureRequest(prompts, (point,), positions=(-1,), plans=compiled, logits="last")
    found = engine.capture(request)
    logits = [one.logits[-1] for one in found if one.logits is not None]
    return torch.stack(logits), torch.stack([one.states[point][-1] for one in found])


def ids(engine: TransformersEngine) -> list[int]:
    return [
        engine.tokenizer.encode(word, add_special_tokens=False)[0] for word in CAPITALS.values()
    ]


OTHERS = [*list(CAPITALS.values())[1:], " Paris"]


def test_adding_it_raises_what_the_lens_reads_and_what_is_said(demo: TransformersEngine) -> None:
    before, states = read(demo, None, None, None, None)
    assert before.argmax(-1).tolist() == ids(demo)
    targets = [*ids(demo)[1:], ids(demo)[0]]
    items = [
        {"kind": "add", "vector": {"token": word}, "strength": {"norm": 1.0}, "layers": [LAYER]}
        for word in OTHERS
    ]
    after, steered = read(demo, *items)
    assert after.argmax(-1).tolist() == targets
    for n, target in enumerate(targets):
        plain, moved = (demo.unembed(x[n]).log_softmax(-1)[target] for x in (states, steered))
        assert moved > plain + 1


def test_through_a_lens_it_raises_what_that_lens_reads(demo: TransformersEngine) -> None:
    lens: Lens = LENSES["tuned"]
    targets = [*ids(demo)[1:], ids(demo)[0]]
    items = [
        {"kind": "add", "vector": {"token": token, "lens": "tuned"}, "strength": {"norm": 0.5}}
        | {"layers": [LAYER]}
        for token in targets
    ]
    (_, states), (_, steered) = read(demo, None, None, None, None), read(demo, *items)
    for n, target in enumerate(targets):
        readings = [
            demo.unembed(lens.translated(x[n][None], LAYER, "resid_post"))[0].log_softmax(-1)[
                target
            ]
            for x in (states, steered)
        ]
        assert readings[1] > readings[0] + 1


def test_ablating_it_takes_the_answer_and_another_token_does_not(demo: TransformersEngine) -> None:
    mine = ids(demo)
    before, _ = read(demo, None, None, None, None)
    layers = list(range(2, 5))

    def chances(words: list[Any]) -> Tensor:
        items = [{"kind": "ablate", "vector": {"token": one}, "layers": layers} for one in words]
        logits, _ = read(demo, *items)
        return logits.softmax(-1)[range(4), mine]

    plain = before.softmax(-1)[range(4), mine]
    assert bool((chances(list(CAPITALS.values())) < plain).all())
    assert float(chances(list(CAPITALS.values())).mean()) < float(plain.mean()) - 0.3
    assert float(chances([2000, 2001, 2002, 2003]).mean()) > float(plain.mean()) - 0.05


def test_exchanging_two_puts_the_other_answer_there(demo: TransformersEngine) -> None:
    items = [
        {"kind": "exchange", "vector": {"token": mine}, "toward": {"token": other}}
        | {"layers": [2, 3, 4]}
        for mine, other in zip(CAPITALS.values(), OTHERS, strict=True)
    ]
    logits, _ = read(demo, *items)
    assert logits.argmax(-1).tolist() == [*ids(demo)[1:], ids(demo)[0]]


def test_swapping_two_puts_the_other_answer_there(demo: TransformersEngine) -> None:
    def said(pairs: list[tuple[Any, Any]]) -> list[int]:
        items = [
            {"kind": "swap", "remove": {"token": mine}, "add": {"token": other}}
            | {"strength": 0.25, "layers": [2, 3, 4]}
            for mine, other in pairs
        ]
        return read(demo, *items)[0].argmax(-1).tolist()

    targets = [*ids(demo)[1:], ids(demo)[0]]
    assert said(list(zip(CAPITALS.values(), OTHERS, strict=True))) == targets
    drawn = said([(2000 + n, 2004 + n) for n in range(4)])
    assert all(one != target for one, target in zip(drawn, targets, strict=True))
