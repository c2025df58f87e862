"""Rows of a model's output matrix with its final norm folded in, and the proof that they are these.

After the last block a state h gives the token t the logit f(s·⟨w_t, γ ⊙ n(h)/σ + β⟩ + b_t): n takes
the mean away where the norm is a LayerNorm, f is a scale or a soft cap. What all logits have in
common changes no probability, and rows have much in common: w̄, their mean, is left out. An engine
gives w_t − w̄ and the norm; what comes of them, n(γ ⊙ (w_t − w̄)), is then held against the logits
that the model itself makes.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.token_direction import ReadToken
from steer.errors import SpecError, SteerError, Unsupported
from steer.model import ModelInfo
from steer.prompts import token_texts, trigger_tokens

_KEPT = 256
_PROBES = 16
_LIKE = 0.95
"""The least correlation of a row's products with the model's logits on random states: half
precision and a soft cap bend it a little, and with another row it is within ±.7."""


class OutputMatrix(Protocol):
    """A model whose states can be read as logits: an `Engine`, or what it runs."""

    @property
    def info(self) -> ModelInfo: ...

    def unembed(self, states: Tensor) -> Tensor: ...

    def token_rows(self, tokens: Sequence[int]) -> Tensor: ...


def folded_rows(
    rows: Float[Tensor, "N d_model"], norm: Callable[[Tensor], Tensor]
) -> Float[Tensor, "N d_model"]:
    """`rows` of an output matrix with the scale of `norm` folded in, and without their mean where
    `norm` takes the mean away. `norm` maps states `[N, d_model]` to what the matrix is given.

    A state of mean 0 and variance 1 comes out as itself times the scale, beside a bias.
    """
    state = _standard(rows.shape[-1])
    one, other, moved = norm(torch.stack([state, -state, state + 3])).float().cpu().unbind()
    scale = (one - other) / (2 * state)
    made = rows.float().cpu() * scale
    centres = (moved - one).norm() < 0.1 * (one - other).norm()
    return made - made.mean(-1, keepdim=True) if centres else made


def _standard(width: int) -> Tensor:
    """A state of mean 0 and variance 1 without zeros."""
    state = torch.tensor([1.0, -1.0]).repeat(width // 2 + 1)[:width]
    if width % 2:
        state[-3:] = torch.tensor([2.0**0.5, -(0.5**0.5), -(0.5**0.5)])
    return state


def proven_rows(model: OutputMatrix, tokens: Sequence[int]) -> Float[Tensor, "N d_model"]:
    """`model.token_rows`, compared with what the model makes of random states.

    Raises `Unsupported` (`no_unembedding`) where it has none, or they are not its own.
    """
    rows = model.token_rows(tokens)
    states = torch.randn(_PROBES, model.info.d_model, generator=torch.Generator().manual_seed(0))
    states -= states.mean(-1, keepdim=True)
    states /= states.square().mean(-1, keepdim=True).sqrt()
    logits = model.unembed(torch.cat([states, -states])).float().cpu()
    logits = logits[:, list(tokens)] - logits.mean(-1, keepdim=True)
    said = (logits[:_PROBES] - logits[_PROBES:]) / 2
    alike = torch.cosine_similarity(states.double() @ rows.double().T, said.double(), dim=0)
    if not bool((alike >= _LIKE).all()):
        raise no_token_rows(
            model.info.architecture,
            "what comes after its last block is not one norm and one output matrix",
        )
    return rows


def no_token_rows(model: str, reason: str) -> Unsupported:
    """For a model whose tokens have no rows that can be read."""
    return Unsupported(
        f"the directions of single tokens cannot be read off {model}: {reason}. Name a registered "
        "vector instead",
        code="no_unembedding",
    )


def token_reader(model: OutputMatrix, tokenizer: Any) -> ReadToken:
    """Reads the tokens of `model`, each row once as long as it is among the last. Without a
    `tokenizer` (None) tokens are named by their ids."""
    kept: OrderedDict[int, Tensor] = OrderedDict()
    lock = threading.Lock()

    def read(token: int | str) -> tuple[int, Tensor]:
        number = token_number(token, tokenizer, model.info.vocab_size)
        with lock:
            if number in kept:
                kept.move_to_end(number)
                return number, kept[number]
        try:
            row = proven_rows(model, [number])[0]
        except SteerError as error:
            raise error.at("/token") from None
        with lock:
            kept[number] = row
            while len(kept) > _KEPT:
                kept.popitem(last=False)
        return number, row

    return read


def token_number(token: int | str, tokenizer: Any, vocab_size: int) -> int:
    """The id of a token that is given by its id or its text.

    Raises `SpecError`: `unknown_token`, and `not_one_token` for a text of several or of none.
    """
    if isinstance(token, int):
        if token >= vocab_size:
            raise SpecError(
                f"the token {token} is not in the vocabulary of {vocab_size}: give an id from 0 to "
                f"{vocab_size - 1}",
                code="unknown_token",
                param="/token",
            )
        return token
    if tokenizer is None:
        raise SpecError(
            f"the token {token!r} is a text and there is no tokenizer here: give its id",
            param="/token",
        )
    ids = trigger_tokens(tokenizer, token)
    if len(ids) != 1:
        raise SpecError(_not_one(token, ids, tokenizer), code="not_one_token", param="/token")
    return ids[0]


def _not_one(text: str, ids: Sequence[int], tokenizer: Any) -> str:
    pieces = ", ".join(
        f"{piece!r} ({number})"
        for number, piece in zip(ids[:8], token_texts(tokenizer, ids[:8]), strict=True)
    )
    more = f" and {len(ids) - 8} more" if len(ids) > 8 else ""
    advice = "give a text that is a single token, or the id of one"
    other = text[1:] if text.startswith(" ") else " " + text
    found = trigger_tokens(tokenizer, other) if other else []
    if len(found) == 1:
        how = "without its leading space" if text.startswith(" ") else "with a leading space"
        advice = f"{how} it is one, {other!r} ({found[0]})"
    return (
        f"{text!r} is {len(ids)} tokens, {pieces}{more}, and a direction is one token's: {advice}"
    )
