"""What heads attend with, from what their attention was handed; and whether it did attend so.

vLLM's kernels attend over pages and keep no weights. The weights are computed once more, of queries
and keys, as the attention's own fields say: scale, soft cap, distance biases, window, sinks. A
kernel may do what no field says, so these count only where weights times values are what it made.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Attention
from steer.engines.vllm.inside.notes import LayerNotes
from steer.errors import Unsupported

_TOLERANCE = 1e-4
_TOLERANCE_HALF = 3e-2
"""How far, relative to its length, what was made at a token may be from weights times values, in 32
bits and in 16."""


@dataclass(frozen=True)
class AttentionForm:
    """How an attention makes weights of scores: they are scaled, capped at `cap`, biased by
    distance with `slopes` `[heads]`, limited to the last `window` tokens, and share their sum with
    `sinks` `[heads]`, scores that stand for no token."""

    scale: float
    cap: float | None = None
    slopes: Float[Tensor, " heads"] | None = None
    window: int | None = None
    sinks: Float[Tensor, " heads"] | None = None

    @staticmethod
    def of(attention: Any) -> AttentionForm:
        """That of one of vLLM's `Attention` layers: its backends name these alike but for the
        window, which the layer itself says in tokens."""
        impl = attention.impl
        return AttentionForm(
            float(impl.scale),
            float(getattr(impl, "logits_soft_cap", None) or 0) or None,
            _row(getattr(impl, "alibi_slopes", None)),
            attention.sliding_window,
            _row(getattr(impl, "sinks", None)),
        )

    def weights(
        self,
        query: Float[Tensor, "positions heads head_dim"],
        key: Float[Tensor, "tokens groups head_dim"],
        positions: Sequence[int],
    ) -> Float[Tensor, "heads positions tokens"]:
        """Those of the queries at `positions`, over all tokens."""
        heads, groups = query.shape[1], key.shape[1]
        repeated = key.repeat_interleave(heads // groups, 1)
        scores = self.scale * torch.einsum("phd,thd->hpt", query, repeated)
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        behind = torch.tensor(positions)[:, None] - torch.arange(len(key))
        if self.slopes is not None:
            scores = scores - self.slopes[:, None, None] * behind
        hidden = behind < 0
        if self.window is not None:
            hidden |= behind >= self.window
        scores = scores.masked_fill(hidden, -torch.inf)
        if self.sinks is None:
            return scores.softmax(-1)
        sinks = self.sinks[:, None, None].expand(-1, len(positions), 1)
        return torch.cat([scores, sinks], -1).softmax(-1)[..., :-1]

    def alone(
        self,
        query: Float[Tensor, "N heads head_dim"],
        key: Float[Tensor, "N groups head_dim"],
    ) -> Float[Tensor, "N heads"]:
        """That of a token that has itself alone to attend to: 1, or what sinks leave of it."""
        heads, groups = query.shape[1], key.shape[1]
        if self.sinks is None:
            return query.new_ones(query.shape[:2])
        scores = self.scale * (query * key.repeat_interleave(heads // groups, 1)).sum(-1)
        if self.cap is not None:
            scores = self.cap * torch.tanh(scores / self.cap)
        return torch.sigmoid(scores - self.sinks.to(scores))


def attention_of(
    notes: LayerNotes, form: AttentionForm, positions: Sequence[int], layer: int
) -> Attention:
    """What the heads of `layer` attended to at `positions`, each token with all of the prompt.

    Raises `Unsupported` (`no_attention`) where that is not what the attention did.
    """
    rows = list(positions)
    weights = form.weights(notes.query[rows], notes.key, rows)
    heads, groups = notes.query.shape[1], notes.value.shape[1]
    values = notes.value.repeat_interleave(heads // groups, 1).transpose(0, 1).contiguous()
    told = torch.einsum("hpt,htd->phd", weights, values).flatten(1)
    made = notes.made[rows].flatten(1)
    allowed = (_TOLERANCE if notes.exact else _TOLERANCE_HALF) * made.norm(dim=-1)
    if not bool(((told - made).norm(dim=-1) <= allowed).all()):
        raise Unsupported(
            f"what the attention of layer {layer} makes on this vLLM is not what its queries, keys "
            "and values give with its scale, caps, window and sinks, so that what its heads attend "
            "to cannot be told: use the transformers engine",
            code="no_attention",
        )
    return Attention(weights, values)


def _row(numbers: Any) -> Tensor | None:
    return None if numbers is None else torch.as_tensor(numbers).detach().float().cpu()
