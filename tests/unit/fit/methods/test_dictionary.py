"""Dictionaries over a real model's activations."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Captured, CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import Marked, fit_nmf, fit_snmf
from steer.fit.methods.dictionaries.dictionary import Dictionary
from steer.model import HookPoint
from steer.spec import parse_spec

WORDS = [f"{a} {b}" for a in ("red", "old", "new", "shy") for b in "abcdefgh"]


def direct(engine: TransformersEngine, prompts: Sequence[str], point: HookPoint) -> torch.Tensor:
    tokens = [engine.tokenizer.encode(text) for text in prompts]
    return torch.cat(
        [one.states[point] for one in engine.capture(CaptureRequest(tokens, (point,)))]
    )


def test_neurons_that_fire_together(lively: TransformersEngine) -> None:
    done: list[int] = []
    found = fit_snmf(
        lively, WORDS, layer=1, components=6, keep=0.1, iterations=30, progress=done.append
    )
    assert found.point == HookPoint(1, "mlp_act")
    assert found.components.shape == (6, 48)
    assert bool(((found.components != 0).sum(1) <= 5).all())
    torch.testing.assert_close(found.components.norm(dim=1), torch.ones(6))
    assert found.provenance["activations"] == sum(len(w) + 1 for w in WORDS)
    assert sum(done) == len(WORDS) + 30
    rows = direct(lively, WORDS, found.point).double()
    assert 0 < found.explained <= 1
    for k, examples in enumerate(found.examples):
        assert examples
        weights = [one.weight for one in examples]
        assert weights == sorted(weights, reverse=True)
        assert float(found.scales[k]) > 0
    assert len(rows) == found.provenance["activations"]


def test_a_dictionary_of_last_tokens_tells_the_words_apart(lively: TransformersEngine) -> None:
    prompts = [f"{text} {word}" for word in ("sun", "moo") for text in WORDS]
    found = fit_nmf(lively, prompts, layer=1, components=2, iterations=100)
    assert found.explained > 0.5
    ends = [{one.text[-3:] for one in examples} for examples in found.examples]
    assert sorted(map(tuple, ends)) == [("moo",), ("sun",)]


def test_a_component_steers_where_it_was_found(lively: TransformersEngine) -> None:
    found = fit_snmf(lively, WORDS, layer=1, components=4, keep=0.1, iterations=10)
    vector = found.vector(2, name="c", where="all")
    assert (vector.card.site, vector.card.width, vector.card.layers) == ("mlp_act", 48, (1,))
    assert vector.card.provenance["component"] == 2
    torch.testing.assert_close(vector[1], found.components[2] * found.scales[2])
    plan = plans_of(lively, MemoryLibrary({"c": vector})).plan(
        parse_spec({"interventions": [{"kind": "add", "vector": "c", "strength": 0.5}]})
    )
    tokens = lively.tokenizer.encode("red sun")
    plain, steered = (
        lively.capture(CaptureRequest([tokens], (found.point,), plans=[p]))[0].states[found.point]
        for p in (None, plan)
    )
    torch.testing.assert_close(steered, plain + 0.5 * vector[1], rtol=1e-4, atol=1e-5)
    with pytest.raises(SteerError) as caught:
        found.vector(4, name="c")
    assert caught.value.code == "component_out_of_range"


class Watched:
    """Passes everything to an engine, and counts the states that exist at a time."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.info, self.tokenizer = engine.info, engine.tokenizer
        self.most = 0

    def capture(self, request: CaptureRequest) -> list[Captured]:
        captured = self._engine.capture(request)
        self.most = max(
            self.most, sum(state.numel() for one in captured for state in one.states.values())
        )
        return captured


def test_memory_is_one_batch_and_the_sample(lively: TransformersEngine) -> None:
    watched: Any = Watched(lively)
    found = fit_snmf(watched, WORDS * 4, layer=0, components=3, iterations=2, sample=50, batch=4)
    assert watched.most <= 4 * (max(map(len, WORDS)) + 1) * 48
    assert found.provenance["sampled"] == 50
    assert found.provenance["activations"] == 4 * sum(len(w) + 1 for w in WORDS)


def test_responses_alone_can_be_read(lively: TransformersEngine) -> None:
    prompts = [Marked(word, response="!?") for word in WORDS]
    found = fit_snmf(lively, prompts, layer=0, components=2, iterations=5, positions="response")
    assert found.provenance["activations"] == 2 * len(WORDS)
    assert {one.text[-1] for row in found.examples for one in row} <= {"!", "?"}


def test_the_same_seed_finds_the_same(lively: TransformersEngine) -> None:
    def run() -> Dictionary:
        return fit_nmf(lively, WORDS, layer=1, components=3, iterations=5, sample=20, seed=4)

    assert torch.equal(run().components, run().components)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"components": 33}, "invalid_option"),
        ({"sample": 0}, "invalid_option"),
        ({"layer": 3}, "layer_out_of_range"),
        ({"batch": 0}, "invalid_option"),
        ({"prompts": []}, "no_prompts"),
    ],
)
def test_what_cannot_be_factored_is_refused(
    lively: TransformersEngine, options: dict[str, Any], code: str
) -> None:
    arguments: dict[str, Any] = {"layer": 1, "prompts": WORDS, **options}
    with pytest.raises(SteerError) as caught:
        fit_nmf(lively, arguments.pop("prompts"), **arguments)
    assert caught.value.code == code
