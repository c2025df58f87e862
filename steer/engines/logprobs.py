"""From logits to the log-probabilities that are reported, on every engine alike."""

from __future__ import annotations

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

from steer.engines.base import TokenLogprob
from steer.errors import SteerError

LEAST_LOGPROB = -9999.0
"""Reported for tokens that a model never says, as by OpenAI and vLLM: JSON has no −inf."""


def log_probabilities(logits: Float[Tensor, "*rows vocab"]) -> Float[Tensor, "*rows vocab"]:
    """The log-softmax of float32 logits, as far down as it is reported."""
    return logits.log_softmax(-1).clamp_min_(LEAST_LOGPROB)


def token_logprob(row: Float[Tensor, " vocab"], token: int, count: int) -> TokenLogprob:
    """`token` and the best `count` of one row of log-probabilities."""
    top: tuple[tuple[int, float], ...] = ()
    if count:
        values, ids = row.topk(count)
        top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
    return TokenLogprob(float(row[token]), top)


def following(
    logits: Float[Tensor, "positions vocab"], tokens: Sequence[int], count: int
) -> list[TokenLogprob]:
    """The log-probability of each of `tokens` under the logits of the position before it.

    Raises `SteerError` (`not_finite`) where the logits hold NaN or infinity.
    """
    rows = logits[: len(tokens)]
    if not bool(rows.amax(-1).isfinite().all()):
        raise SteerError(
            "the log-probabilities of the prompt are not finite: with a steering, use a smaller "
            "strength; without one, load the model in a wider dtype",
            code="not_finite",
        )
    table = log_probabilities(rows)
    return [token_logprob(row, token, count) for row, token in zip(table, tokens, strict=True)]
