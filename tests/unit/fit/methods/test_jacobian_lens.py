"""Jacobian lenses, against autograd's own in float64 and against a planted linear model."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from steer.engines.fake.engine import ByteTokenizer, FakeEngine, fake_model
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit import fit_jacobian_lens
from steer.fit.methods.lenses.jacobian import PARTS, _shares, mean_jacobians

TEXTS = ["the red fox runs", "a river of sand and", "who goes", "seven small stones fell"]
WIDTH, SKIP = 32, 3


def reference(engine: TransformersEngine, text: tuple[int, ...], block: int) -> Tensor:
    """J `[d, d]` of one text into `block`, float64: the whole Jacobian [t', d, t, d], then the sum
    over t' and the mean over t, both from SKIP to the last token but one."""
    model = deepcopy(engine._hooked.model).double()
    ids, layers = torch.tensor([text]), model.model.layers
    seen: dict[str, Tensor] = {}

    def keep(_module: Any, _args: Any, output: Any) -> None:
        seen["last"] = output if isinstance(output, Tensor) else output[0]

    def final(states: Tensor) -> Tensor:
        def put(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return ((states, *args[1:]), kwargs)

        first = layers[block].register_forward_pre_hook(put, with_kwargs=True)
        last = layers[-1].register_forward_hook(keep)
        model(input_ids=ids, use_cache=False)
        first.remove()
        last.remove()
        return seen["last"][0, SKIP:-1].sum(0)

    start: dict[str, Tensor] = {}

    def read(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        start["x"] = (args[0] if args else kwargs["hidden_states"]).detach()

    handle = layers[block].register_forward_pre_hook(read, with_kwargs=True)
    model(input_ids=ids, use_cache=False)
    handle.remove()
    whole = torch.autograd.functional.jacobian(final, start["x"])  # [d, 1, t, d]
    return whole[:, 0, SKIP:-1].mean(1)


def ids_of(engine: TransformersEngine, *texts: str) -> list[tuple[int, ...]]:
    return [tuple(engine.tokenizer.encode(text)) for text in texts]


@pytest.mark.parametrize("batch", [1, 3, 40])
def test_it_is_the_mean_of_the_whole_jacobians(lively: TransformersEngine, batch: int) -> None:
    texts = ids_of(lively, *TEXTS[:2])
    found = mean_jacobians(lively, texts, 2, SKIP, 0, batch, None)
    assert sorted(found) == [0, 1, 2]
    for block, got in found.items():
        wanted = sum(reference(lively, text, block) for text in texts) / 2
        torch.testing.assert_close(got.double(), wanted, atol=1e-4, rtol=1e-4)


def test_each_row_is_the_mean_over_its_own_texts(lively: TransformersEngine) -> None:
    texts = ids_of(lively, *TEXTS)
    found = mean_jacobians(lively, texts, 2, SKIP, 5, 3, None)
    whole = {text: mean_jacobians(lively, [text], 1, SKIP, 0, 8, None) for text in texts}
    shares = _shares(texts, WIDTH, 2, 5)
    for row in range(WIDTH):
        mine = [share.text for share in shares if row in share.coordinates]
        assert len(set(mine)) == 2
        for block, got in found.items():
            wanted = torch.stack([whole[text][block][row] for text in mine]).mean(0)
            torch.testing.assert_close(got[row], wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("texts", "each"), [(7, 7), (7, 3), (32, 4), (100, 8), (3, 1)])
def test_every_row_has_equally_many_texts(texts: int, each: int) -> None:
    made = [(n, *range(n % 5)) for n in range(texts)]
    counts = [0] * WIDTH
    for share in _shares(made, WIDTH, each, 1):
        assert len(set(share.coordinates)) == len(share.coordinates)
        for row in share.coordinates:
            counts[row] += 1
    assert counts == [each] * WIDTH


@pytest.fixture(scope="module")
def linear() -> Iterator[tuple[TransformersEngine, list[Tensor]]]:
    """A model of two blocks, each a matrix: x + M x."""

    class Block(torch.nn.Module):
        def __init__(self, matrix: Tensor) -> None:
            super().__init__()
            self.matrix = torch.nn.Parameter(matrix)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.matrix.T

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
    matrices = [torch.randn(WIDTH, WIDTH) / 8 for _ in range(2)]
    for block, matrix in zip(model.model.layers, matrices, strict=True):
        torch.nn.init.zeros_(block.self_attn.o_proj.weight)
        block.post_attention_layernorm = torch.nn.Identity()
        block.mlp = Block(matrix)
    with TransformersEngine(model, ByteTokenizer(), name="linear", rows=8, slots=4) as running:
        yield running, matrices


def test_a_planted_linear_model_gives_its_matrices(
    linear: tuple[TransformersEngine, list[Tensor]],
) -> None:
    engine, (first, second) = linear
    found = mean_jacobians(engine, ids_of(engine, *TEXTS), 4, SKIP, 0, 4, None)
    eye = torch.eye(WIDTH)
    torch.testing.assert_close(found[1], eye + second, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[0], (eye + second) @ (eye + first), atol=1e-5, rtol=1e-5)


def test_the_card_and_the_progress(lively: TransformersEngine) -> None:
    told: list[int] = []
    lens = fit_jacobian_lens(
        lively, [*TEXTS, "a"], name="reader", skip=SKIP, average=2, progress=told.append
    )
    made: dict[str, Any] = lens.card.provenance
    assert (lens.method, lens.card.layers, lens.card.name) == ("jacobian", (0, 1, 2), "reader")
    assert (made["average"], made["prompts"], made["short"]) == (2, 4, 1)
    assert [*made["kl"]] == ["0", "1", "2"]
    assert made["kl"]["2"]["plain"] > 0
    assert sum(told) == PARTS
    lens.check_fits(lively.info)
    again = fit_jacobian_lens(lively, [*TEXTS, "a"], name="reader", skip=SKIP, average=2)
    assert again.sha256 == lens.sha256


def test_what_cannot_be_fitted(lively: TransformersEngine) -> None:
    with pytest.raises(SteerError, match=r"none of the 1 prompts has the 18 tokens") as raised:
        fit_jacobian_lens(lively, ["short"], name="x")
    assert raised.value.code == "no_prompts"
    with pytest.raises(SteerError) as raised:
        fit_jacobian_lens(FakeEngine(fake_model()), TEXTS, name="x")
    assert raised.value.code == "no_gradients"


def test_some_layers_are_those_of_the_whole_lens(lively: TransformersEngine) -> None:
    how: dict[str, Any] = {"name": "j", "skip": SKIP, "average": 2, "held_out": 0.5}
    whole = fit_jacobian_lens(lively, TEXTS, **how)
    some = fit_jacobian_lens(lively, TEXTS, layers=[0], **how)
    assert (some.card.layers, some.card.depth, some.blocks) == ((1,), 3, 3)
    assert (whole.card.layers, whole.card.depth, whole.blocks) == ((0, 1, 2), None, 3)
    torch.testing.assert_close(some.translators[1].weight, whole.translators[1].weight)
    kls = [one.card.provenance["kl"] for one in (some, whole)]
    assert list(kls[0]) == ["1"]
    assert kls[0]["1"] == pytest.approx(kls[1]["1"], abs=1e-3)
    some.check_fits(lively.info)


def test_the_last_layer_alone_needs_no_depth_on_the_card(lively: TransformersEngine) -> None:
    lens = fit_jacobian_lens(lively, TEXTS, name="j", skip=SKIP, average=1, layers=[1])
    assert (lens.card.layers, lens.card.depth, lens.blocks) == ((2,), None, 3)


@pytest.mark.parametrize(
    ("layers", "code", "at"),
    [([0, 2], "invalid_option", "/layers/1"), ([7], "layer_out_of_range", "/layers/0")],
)
def test_layers_without_a_map(
    lively: TransformersEngine, layers: list[int], code: str, at: str
) -> None:
    with pytest.raises(SteerError) as caught:
        fit_jacobian_lens(lively, TEXTS, name="j", skip=SKIP, layers=layers)
    assert (caught.value.code, caught.value.param) == (code, at)
