"""What the attentions of a model were handed for one request's prompt, by position.

A prompt may be computed in pieces, beside other requests, and again after a preemption: a token's
rows are those of its position, whichever pass they come from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass
class LayerNotes:
    """One layer's queries, after whatever the model does to them, its keys and values, and what the
    attention made of them; all float32, on the host. `seen` says which rows are there, and `exact`
    whether the pass computed them in 32 bits."""

    query: Float[Tensor, "tokens heads head_dim"]
    key: Float[Tensor, "tokens groups head_dim"]
    value: Float[Tensor, "tokens groups head_dim"]
    made: Float[Tensor, "tokens heads head_dim"]
    seen: Tensor
    exact: bool

    @staticmethod
    def empty(length: int, like: Mapping[str, Tensor]) -> LayerNotes:
        """Of a prompt of `length` tokens, rows formed as those of `like`."""
        rows = {name: torch.zeros(length, *one.shape[1:]) for name, one in like.items()}
        exact = like["query"].dtype == torch.float32
        return LayerNotes(**rows, seen=torch.zeros(length, dtype=torch.bool), exact=exact)


class AttentionNotes:
    """Those of one request, of the layers that it asks for and that this worker has."""

    def __init__(self, layers: Sequence[int], length: int) -> None:
        self._length = length
        self.layers: dict[int, LayerNotes | None] = dict.fromkeys(layers)
        """None where nothing was seen yet."""
        self.strange: dict[int, str] = {}
        """Why what a layer's attention was handed says nothing, where it does not."""

    def take(self, layer: int, start: int, rows: Mapping[str, Tensor | None]) -> None:
        """The `rows` of the tokens from position `start` on: query, key, value and what was made;
        tokens behind the prompt's end are left out."""
        given = {name: one for name, one in rows.items() if one is not None}
        if len(given) < len(rows):
            lacking = ", ".join(name for name in rows if name not in given)
            self.strange[layer] = f"is handed no {lacking} of its own"
            return
        notes = self.layers[layer]
        if notes is None:
            notes = self.layers[layer] = LayerNotes.empty(self._length, given)
        end = min(start + len(given["query"]), self._length)
        for name, one in given.items():
            getattr(notes, name)[start:end] = one[: end - start].detach().float().cpu()
        notes.seen[start:end] = True
