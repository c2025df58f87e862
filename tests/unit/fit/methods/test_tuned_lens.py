"""Tuned lenses: planted maps, the divergence held out, and what a layer keeps."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from steer.artefacts.lens import Lens
from steer.engines.base import CaptureRequest
from steer.engines.fake.engine import ByteTokenizer, FakeEngine, fake_model
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import fit_tuned_lens
from steer.fit.methods.lenses.regression import Regression
from steer.fit.methods.lenses.sample import draw_places
from steer.fit.methods.lenses.training import Training, _Correction, train
from steer.model import HookPoint

TEXTS = [
    f"the {word} {beast} runs"
    for word in ("red", "old", "shy", "big", "wet", "odd")
    for beast in ("fox", "hen", "cod", "elk", "owl")
]
FRESH = ["a river of sand", "who goes there now", "seven small stones"]
WIDTH = 32


def lens_of(engine: Any, **changed: Any) -> Lens:
    arguments: dict[str, Any] = {"name": "reader", "steps": 0, "held_out": 0.4, **changed}
    return fit_tuned_lens(engine, TEXTS, **arguments)


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def divergences(engine: TransformersEngine, lens: Lens, texts: list[str]) -> Tensor:
    """Mean KL of the model's own distribution from what is read, `[2, blocks]`: plain, tuned."""
    found = torch.zeros(2, engine.info.n_layers)
    for text in texts:
        points = tuple(HookPoint(n, "resid_pre") for n in range(engine.info.n_layers))
        (one,) = engine.capture(
            CaptureRequest([engine.tokenizer.encode(text)], points, logits="all")
        )
        assert one.logits is not None
        own = one.logits.double().log_softmax(-1)
        for block, point in enumerate(points):
            states = one.states[point]
            for row, read in enumerate((states, lens.translated(states, block, "resid_pre"))):
                said = engine.unembed(read).double().log_softmax(-1)
                found[row, block] += (own.exp() * (own - said)).sum(-1).mean()
    return found / len(texts)


def test_a_planted_rotation_is_recovered() -> None:
    turn, shift = torch.linalg.qr(draw(WIDTH, WIDTH)).Q, draw(WIDTH, seed=1)
    found = Regression(WIDTH)
    for seed in range(4):
        x = draw(100, WIDTH, seed=10 + seed) + 30.0  # far from 0, as streams are
        found.add(x, x @ turn.T + shift)
    base = found.solve(1e-9)
    torch.testing.assert_close(base.weight + torch.eye(WIDTH), turn, rtol=0, atol=1e-3)
    x = draw(50, WIDTH, seed=3) + 30.0
    torch.testing.assert_close(
        x + x @ base.weight.T + base.bias, x @ turn.T + shift, rtol=0, atol=1e-3
    )
    heavy = found.solve(1e6)
    assert float(heavy.weight.abs().max()) < 1e-3  # what a ridge pulls towards is the identity


def test_the_stream_of_rows_may_be_cut_anywhere() -> None:
    x, y = draw(90, WIDTH), draw(90, WIDTH, seed=1)
    whole, parts = Regression(WIDTH), Regression(WIDTH)
    whole.add(x, y)
    for first in range(0, 90, 7):
        parts.add(x[first : first + 7], y[first : first + 7])
    one, other = whole.solve(1e-3), parts.solve(1e-3)
    torch.testing.assert_close(one.weight, other.weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(one.bias, other.bias, rtol=0, atol=1e-4)


def test_an_input_that_never_moves_is_no_obstacle() -> None:
    x, found = draw(80, WIDTH), Regression(WIDTH)
    x[:, 3] = 5.0
    found.add(x, x.flip(1))
    assert bool(found.solve(1e-3).weight.isfinite().all())


def test_a_long_state_counts_as_one() -> None:
    """Its rows are divided by the length of what they should give."""
    x = draw(200, WIDTH)
    plain, sunk = Regression(WIDTH), Regression(WIDTH)
    plain.add(x, 2 * x)
    sunk.add(torch.cat([x, 1e4 * draw(1, WIDTH, seed=8)]), torch.cat([2 * x, 1e4 * x[:1]]))
    one, other = plain.solve(1e-3), sunk.solve(1e-3)
    fresh = draw(50, WIDTH, seed=4)
    read = [fresh + fresh @ t.weight.T + t.bias for t in (one, other)]
    assert float((read[1] - read[0]).norm() / read[0].norm()) < 0.3


@pytest.mark.parametrize("steps", [0, 6])
def test_no_layer_reads_worse_than_the_plain_lens(lively: TransformersEngine, steps: int) -> None:
    lens = lens_of(lively, steps=steps, rows=16)
    made: dict[str, Any] = lens.card.provenance["kl"]  # type: ignore[assignment]
    assert sorted(made) == ["0", "1", "2"]
    assert all(one["tuned"] <= one["plain"] for one in made.values())
    plain, tuned = divergences(lively, lens, FRESH)
    assert bool((tuned < plain).all()), (plain, tuned)
    assert float(tuned.mean()) < 0.8 * float(plain.mean())


def test_the_card_says_what_was_measured(lively: TransformersEngine) -> None:
    lens = lens_of(lively)
    made: dict[str, Any] = lens.card.provenance
    assert (lens.card.site, lens.card.model, lens.card.kind) == ("resid_pre", "lively", "lens")
    every = sum(len(lively.tokenizer.encode(text)) for text in TEXTS)
    assert 0 < made["held_out_tokens"] < every - made["tokens"]  # half of the others choose
    assert {one["from"].split()[0] for one in made["kl"].values()} <= {"ridge", "plain"}


@pytest.fixture(scope="module")
def still() -> Iterator[TransformersEngine]:
    """A model whose blocks add nothing, so that every layer is the last one."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=128,
    )
    model = LlamaForCausalLM(config)
    for block in model.model.layers:
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        torch.nn.init.zeros_(block.mlp.down_proj.weight)
    with TransformersEngine(model, ByteTokenizer(), name="still", rows=8, slots=4) as running:
        yield running


def test_where_the_plain_lens_is_right_it_stays(still: TransformersEngine) -> None:
    lens = lens_of(still)
    made: dict[str, Any] = lens.card.provenance["kl"]  # type: ignore[assignment]
    for block, (weight, bias) in lens.translators.items():
        assert made[str(block)]["from"] == "plain lens"
        assert not weight.any()
        assert not bias.any()


def test_training_lowers_what_it_trains(lively: TransformersEngine) -> None:
    """From a closed form that is far off, on the tokens that it is trained on."""
    points = (HookPoint(0, "resid_pre"), *(HookPoint(n) for n in range(3)))
    captured = lively.capture(CaptureRequest([lively.tokenizer.encode(t) for t in TEXTS], points))
    states = torch.stack([torch.cat([one.states[p] for one in captured]) for p in points])
    bases = {}
    for block in range(3):
        regression = Regression(WIDTH)
        regression.add(states[block], states[-1])
        bases[block] = regression.solve(10.0)
    untrained = Lens.of({n: (base.weight, base.bias) for n, base in bases.items()})
    told: list[int] = []
    trained = Lens.of(
        train(lively, bases, states, Training(30, 64, 3e-3, 0), "a test", told.append)
    )
    before, after = (divergences(lively, one, TEXTS)[1] for one in (untrained, trained))
    assert bool((after < 0.9 * before).all()), (before, after)
    assert told == [1] * 30


def test_a_correction_folds_into_one_map() -> None:
    regression = Regression(WIDTH)
    regression.add(draw(100, WIDTH) + 3, draw(100, WIDTH, seed=1))
    one = _Correction(regression.solve(1e-2))
    with torch.no_grad():
        one.matrix.copy_(draw(WIDTH, WIDTH, seed=5))
        one.shift.copy_(draw(WIDTH, seed=6))
        x = draw(7, WIDTH, seed=7) + 3
        weight, bias = one.folded()
        torch.testing.assert_close(one(x), x + x @ weight.T + bias, rtol=1e-4, atol=1e-4)


def test_the_same_request_gives_the_same_lens(lively: TransformersEngine) -> None:
    assert lens_of(lively, steps=2, rows=8).sha256 == lens_of(lively, steps=2, rows=8).sha256


def test_answers_are_read_as_well(lively: TransformersEngine) -> None:
    told: list[int] = []
    lens = lens_of(lively, answer_tokens=8, progress=told.append)
    assert lens.card.provenance["tokens"] > lens_of(lively).card.provenance["tokens"]  # type: ignore[operator]
    assert sum(told) == 2 * len(TEXTS)


def test_places_are_drawn_from_all_tokens() -> None:
    texts = [(1,) * 5, (1,) * 50, (1,)]
    places = draw_places(texts, 20, seed=0)
    assert sum(map(len, places)) == 20
    assert all(
        place < len(text) for text, kept in zip(texts, places, strict=True) for place in kept
    )
    assert draw_places(texts, 99, seed=0)[2] == [0]


@pytest.mark.parametrize(
    ("changed", "code"),
    [({"steps": 1}, "no_gradients"), ({"held_out": 1.0}, "invalid_option")],
)
def test_what_an_engine_cannot_do_is_refused(changed: dict[str, Any], code: str) -> None:
    with pytest.raises(SteerError) as caught:
        lens_of(FakeEngine(fake_model()), **changed)
    assert caught.value.code == code


def test_too_few_texts_are_refused(lively: TransformersEngine) -> None:
    with pytest.raises(SteerError) as caught:
        fit_tuned_lens(lively, TEXTS[:7], name="x")
    assert caught.value.code == "no_prompts"
