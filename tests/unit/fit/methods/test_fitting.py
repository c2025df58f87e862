"""Fitting on a real model against a direct computation."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.engines.base import Captured, CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import Pair, PairSet, fit
from steer.fit.data.pairs import Prompt, render
from steer.fit.methods.card import best_layers
from steer.fit.methods.fitting import split_pairs

WORDS = [
    *("red", "blue", "green", "black", "white", "small", "large", "old"),
    *("new", "warm", "cold", "soft", "hard", "long", "short", "kind"),
]
PAIRS = PairSet.of([Pair(f"the {word} sun is good", f"a {word} moon is bad") for word in WORDS])
CHATS = PairSet.of(
    [
        Pair(
            [{"role": "system", "content": "Sing!"}, {"role": "user", "content": word}],
            [{"role": "user", "content": word}],
        )
        for word in WORDS
    ]
)


def direct_states(engine: TransformersEngine, prompt: Prompt) -> list[Tensor]:
    """Every block's output `[tokens, d]`, one prompt at a time, by transformers alone."""
    model: Any = engine._hooked.model
    found: list[Tensor] = []

    def keep(module: Any, args: Any, output: Any) -> None:
        found.append((output if isinstance(output, Tensor) else output[0])[0].float())

    handles = [block.register_forward_hook(keep) for block in model.model.layers]
    try:
        with torch.inference_mode():
            model(torch.tensor([render(engine.tokenizer, prompt)]))
    finally:
        for handle in handles:
            handle.remove()
    return found


@pytest.mark.parametrize("pairs", [PAIRS, CHATS], ids=["texts", "chats"])
@pytest.mark.parametrize("positions", ["last", "mean"])
def test_difference_of_means_equals_a_direct_computation(
    engine: TransformersEngine, pairs: PairSet, positions: Any
) -> None:
    vector = fit(engine, pairs, name="v", positions=positions, held_out=0.0)
    for layer in range(3):
        rows = []
        for pair in pairs.items:
            states = [direct_states(engine, p)[layer] for p in (pair.positive, pair.negative)]
            read = [s[-1] if positions == "last" else s[1:].mean(0) for s in states]
            rows.append(read[0] - read[1])
        torch.testing.assert_close(vector[layer], torch.stack(rows).mean(0), rtol=1e-4, atol=1e-5)


def test_it_agrees_with_output_hidden_states(engine: TransformersEngine) -> None:
    """`hidden_states[i + 1]` is block i's output, save for the last, which is normed."""
    vector = fit(engine, PAIRS, name="v", held_out=0.0)
    model: Any = engine._hooked.model
    total = torch.zeros(2, 32)
    for pair in PAIRS.items:
        for prompt, sign in ((pair.positive, 1), (pair.negative, -1)):
            ids = torch.tensor([render(engine.tokenizer, prompt)])
            with torch.inference_mode():
                states = model(ids, output_hidden_states=True).hidden_states
            total += sign * torch.stack([states[1][0, -1], states[2][0, -1]])
    for layer in (0, 1):
        torch.testing.assert_close(vector[layer], total[layer] / len(PAIRS), rtol=1e-4, atol=1e-5)


def test_the_measures_are_of_the_held_out_pairs(engine: TransformersEngine) -> None:
    vector = fit(engine, PAIRS, name="v", held_out=0.25, seed=3)
    split = split_pairs(PAIRS.items, 0.25, 3)
    assert len(split.measured) == 4
    assert not set(map(str, split.measured)) & set(map(str, split.fitted))
    for layer, measured in vector.card.measures.items():
        unit = vector[layer] / vector[layer].norm()
        positive = torch.stack(
            [direct_states(engine, p.positive)[layer][-1] for p in split.measured]
        )
        negative = torch.stack(
            [direct_states(engine, p.negative)[layer][-1] for p in split.measured]
        )
        a, b = positive @ unit, negative @ unit
        pooled = ((a.var() + b.var()) / 2).sqrt()
        assert measured.positive == pytest.approx(float(a.mean()), rel=1e-3, abs=1e-5)
        assert measured.negative == pytest.approx(float(b.mean()), rel=1e-3, abs=1e-5)
        assert measured.separation == pytest.approx(float((a.mean() - b.mean()) / pooled), rel=1e-3)
        norms = torch.cat([positive, negative]).norm(dim=-1)
        assert measured.residual_norm == pytest.approx(float(norms.mean()), rel=1e-4)


def test_the_card_says_where_the_vector_comes_from_and_how_it_is_used(
    engine: TransformersEngine,
) -> None:
    card = fit(engine, PAIRS, name="sun", best=2, description="sunny", licence="MIT").card
    separations = {n: m.separation or 0.0 for n, m in card.measures.items()}
    worst = min(separations, key=separations.__getitem__)
    assert card.default_layers == tuple(sorted(set(separations) - {worst}))
    assert card.default_where is not None
    assert card.default_where.model_dump(exclude_none=True) == {
        "phases": ("prompt",),
        "positions": ((-1, None),),
    }
    assert (card.name, card.model, card.site, card.description) == (
        "sun",
        "tiny",
        "resid_post",
        "sunny",
    )
    linearity = card.provenance.pop("linearity")
    assert set(linearity) == {"0", "1", "2"}
    assert card.provenance == {
        "method": "diffmean",
        "data_sha256": PAIRS.sha256,
        "pairs": 16,
        "held_out_pairs": 0,
        "positions": "last",
        "seed": 0,
        "model": "tiny",
        "architecture": "LlamaForCausalLM",
    }


def test_a_fitted_vector_survives_its_file(engine: TransformersEngine) -> None:
    vector = fit(engine, PAIRS, name="v", where="generation", method="pca", layers=[2, 1])
    again = ControlVector.from_bytes(vector.to_bytes(), name="v")
    assert again.card == vector.card
    assert again.sha256 == vector.sha256
    assert sorted(again.directions) == [1, 2]


def test_a_layer_without_a_difference_is_left_out(engine: TransformersEngine) -> None:
    """Before the first attention the last token is the same in both prompts."""
    same_end = PairSet.of([Pair(f"sun {w}!", f"moon {w}!") for w in WORDS])
    vector = fit(engine, same_end, name="v", site="resid_pre")
    assert sorted(vector.directions) == [1, 2]
    assert sorted(vector.card.measures) == [1, 2]


class Watched:
    """Passes everything to an engine, and counts the states that exist at a time."""

    def __init__(self, engine: TransformersEngine) -> None:
        self._engine = engine
        self.info, self.tokenizer = engine.info, engine.tokenizer
        self.most_floats = 0

    def capture(self, request: CaptureRequest) -> list[Captured]:
        captured = self._engine.capture(request)
        floats = sum(state.numel() for one in captured for state in one.states.values())
        self.most_floats = max(self.most_floats, floats)
        return captured


@pytest.mark.parametrize("batch", [1, 4])
def test_no_more_than_one_batch_of_states_is_held(engine: TransformersEngine, batch: int) -> None:
    watched: Any = Watched(engine)
    vector = fit(watched, PAIRS, name="v", batch=batch)
    assert watched.most_floats == 2 * batch * 3 * 32
    torch.testing.assert_close(vector[2], fit(engine, PAIRS, name="v", batch=16)[2])


def test_progress_counts_every_pair_that_is_read(engine: TransformersEngine) -> None:
    done: list[int] = []
    fit(engine, PAIRS, name="v", held_out=0.25, batch=5, progress=done.append)
    assert sum(done) == len(PAIRS)


@pytest.mark.parametrize(
    ("pairs", "options", "code"),
    [
        (PAIRS, {"method": "magic"}, "unknown_method"),
        (PAIRS, {"layers": [9]}, "layer_out_of_range"),
        (PAIRS, {"site": "nowhere"}, "unsupported_site"),
        (PAIRS, {"held_out": 1.0}, "invalid_option"),
        (PAIRS, {"best": 0}, "invalid_option"),
        (PairSet.of(PAIRS.items[:1]), {}, "no_pairs"),
        (PairSet.of([Pair("same", "same")] * 4), {}, "no_difference"),
        (PairSet.of([Pair("x" * 500, "y")] * 4), {}, "context_length_exceeded"),
        (
            PairSet.of(
                [Pair([{"role": "user", "content": "a"}, {"role": "system", "content": "b"}], "c")]
                * 4
            ),
            {},
            "invalid_messages",
        ),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    engine: TransformersEngine, pairs: PairSet, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        fit(engine, pairs, name="v", **options)
    assert caught.value.code == code


def test_the_best_layers_are_those_with_the_greatest_separation() -> None:
    values = {0: 1.0, 1: 5.0, 2: None, 3: 5.0, 4: 9.0}
    measures = {n: LayerMeasure(separation=value) for n, value in values.items()}
    assert best_layers(measures, 1) == (4,)
    assert best_layers(measures, 2) == (1, 4)
    assert best_layers(measures, 3) == (1, 3, 4)
