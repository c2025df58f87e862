"""The rows of tokens are those of the model's own head, whatever the family, or are refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from tiny_families import FAMILIES, build_family
from tiny_models import VOCABULARY, WIDTH, tiny_tokenizer
from torch import Tensor

from steer.engines.fake.engine import FakeEngine
from steer.engines.token_rows import proven_rows, token_number, token_reader
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.hooks import HookedModel
from steer.engines.transformers.structure.blocks import find_hook_points
from steer.errors import SpecError, Unsupported

TOKENS = (5, 3, 41)
CAPPED = {"gemma2", "gemma3", "gemma4", "paligemma"}
CENTRED = {
    "cohere", "cohere2", "nemotron", "starcoder2", "phi", "neox", "neox-parallel", "falcon", "gpt2",
    "gpt-j", "xglm", "biogpt",
}  # fmt: skip
NO_NORM = {"gpt1"}
REFUSED = {
    "bert": "not one norm and one output matrix",
    "rembert": "its output matrix has width 24",
    "opt": "its output matrix has width 16",
    "opt-post-norm": "its output matrix has width 16",
}


def hooked(name: str, dtype: torch.dtype = torch.float32) -> HookedModel:
    model = build_family(name, dtype)
    return HookedModel(model, find_hook_points(model, name))


def gradient(model: HookedModel, name: str, token: int) -> Tensor:
    """The gradient of the logit of `token` less the mean of all, at a random state, before the norm
    divides.

    What is odd in the state is free of biases; times the norm's own divisor, of which it is known
    here whether that takes the mean away, it is a linear function of the state.
    """
    state = torch.randn(WIDTH, generator=torch.Generator().manual_seed(4)) * 3
    state.requires_grad_()
    said = model.unembed(torch.stack([state, -state]))
    if name in CAPPED:
        said = 5.0 * torch.atanh(said / 5.0)
    said = said[:, token] - said.mean(-1)
    moved = state - state.mean() if name in CENTRED else state
    divisor = 1.0 if name in NO_NORM else moved.square().mean().sqrt()
    (found,) = torch.autograd.grad((said[0] - said[1]) / 2 * divisor, state)
    return found


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in REFUSED])
def test_they_are_the_gradient_of_the_models_own_logits(name: str) -> None:
    model = hooked(name)
    rows = proven_rows(model, TOKENS)
    wanted = torch.stack([gradient(model, name, token) for token in TOKENS])
    alike = torch.cosine_similarity(rows.double(), wanted.double())
    assert float(alike.min()) > 1 - 1e-5, alike


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "cohere"])
def test_half_precision_gives_the_same_to_its_rounding(name: str) -> None:
    exact, half = hooked(name), hooked(name, torch.bfloat16)
    a, b = proven_rows(exact, TOKENS), proven_rows(half, TOKENS)
    assert float(torch.cosine_similarity(a, b).min()) > 1 - 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_a_head_that_is_more_than_a_norm_and_a_matrix_is_refused(name: str) -> None:
    with pytest.raises(Unsupported, match=REFUSED[name]) as caught:
        proven_rows(hooked(name), TOKENS)
    assert caught.value.code == "no_unembedding"


def test_rows_that_are_not_the_models_are_found_out() -> None:
    model: Any = hooked("llama")
    own: Callable[[Sequence[int]], Tensor] = model.token_rows
    model.token_rows = lambda tokens: own([token + 1 for token in tokens])
    with pytest.raises(Unsupported, match="not one norm"):
        proven_rows(model, TOKENS)
    model.token_rows = lambda tokens: -own(tokens)
    with pytest.raises(Unsupported, match="not one norm"):
        proven_rows(model, TOKENS)


def test_every_engine_has_them() -> None:
    fake = FakeEngine()
    assert proven_rows(fake, [3]).shape == (1, fake.info.d_model)
    model = build_family("llama")
    with TransformersEngine(model, tiny_tokenizer(), rows=2, slots=4) as engine:
        assert torch.equal(proven_rows(engine, TOKENS), proven_rows(hooked("llama"), TOKENS))


def test_a_row_is_read_once_while_it_is_among_the_last() -> None:
    asked: list[int] = []

    class Counting(FakeEngine):
        def token_rows(self, tokens: Sequence[int]) -> Tensor:
            asked.extend(tokens)
            return super().token_rows(tokens)

    engine = Counting()
    read = token_reader(engine, engine.tokenizer)
    number, row = read("a")
    assert read(number)[1] is row
    assert asked == [number]


@pytest.mark.parametrize(
    ("token", "code", "says"),
    [
        (VOCABULARY, "unknown_token", "give an id from 0 to"),
        ("w3 w4", "not_one_token", r"is 2 tokens, 'w3' \(3\), 'w4' \(4\)"),
        ("", "not_one_token", "is 0 tokens"),
    ],
)
def test_what_is_no_token_is_refused(token: int | str, code: str, says: str) -> None:
    with pytest.raises(SpecError, match=says) as caught:
        token_number(token, tiny_tokenizer(), VOCABULARY)
    assert (caught.value.code, caught.value.param) == (code, "/token")


def test_a_text_needs_a_tokenizer_and_an_id_does_not() -> None:
    assert token_number(4, None, VOCABULARY) == 4
    assert token_number("w4", tiny_tokenizer(), VOCABULARY) == 4
    with pytest.raises(SpecError, match="give its id"):
        token_number("w4", None, VOCABULARY)


class _Spaced:
    """A tokenizer whose one-token words begin with a space, and in which `x` is not one."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [7] if text == " Paris" else [*range(len(text))]

    def convert_ids_to_tokens(self, ids: Sequence[int]) -> list[str]:
        return [f"t{number}" for number in ids]

    def decode(self, ids: Sequence[int], **_: Any) -> str:
        return "".join(f"t{number}" for number in ids)


def test_the_leading_space_is_said_where_it_helps() -> None:
    with pytest.raises(SpecError, match=r"with a leading space it is one, ' Paris' \(7\)"):
        token_number("Paris", _Spaced(), 64)
    with pytest.raises(SpecError, match="give a text that is a single token, or the id of one"):
        token_number("Rome", _Spaced(), 64)
