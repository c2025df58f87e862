"""What every feature of an SAE does on a stream of tokens, in bounded memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from steer.fit.features.examples import Examples, chance_of
from steer.registry.features.survey import ACTIVE_NONE, BINS, Array, bin_of

TOP = 10
SAMPLE = 12
TOKEN_SAMPLE = 1 << 16
"""Tokens whose most active features are kept, for what fires together."""
ACTIVE = 32
"""Features that are kept of each of these."""
_NUMBERS = 1 << 24

Encode = Callable[[Float[Tensor, "T d_in"]], Float[Tensor, "T d_sae"]]


class Tally:
    """Counts what `encode` gives for states that come in any pieces.

    Guarantees: the result depends on the states and their order alone, to the bit: they are encoded
    in blocks of `block_size` rows, and sums are formed token by token. Memory: about 720 bytes a
    feature, one block's activations, and `TOKEN_SAMPLE` tokens' features.
    """

    def __init__(self, encode: Encode, d_in: int, d_sae: int) -> None:
        self._encode, self.d_sae = encode, d_sae
        self.block_size = min(512, max(16, _NUMBERS // d_sae))
        self._waiting = torch.zeros(0, d_in)
        self._places = np.zeros((2, 0), np.int64)
        self.tokens = 0
        self._fired = np.zeros(d_sae, np.int64)
        self._total = np.zeros(d_sae, np.float64)
        self._largest = np.zeros(d_sae, np.float32)
        self._histogram = np.zeros((d_sae, BINS), np.int32)
        self._top = Examples(d_sae, TOP, one_a_text=True)
        self._sample = Examples(d_sae, SAMPLE, one_a_text=False)
        self._token_rank = np.zeros(0)
        self._token_features = np.zeros((0, ACTIVE), np.int32)

    def add(
        self,
        states: Float[Tensor, "T d_in"],
        text: int,
        first: int = 0,
        *,
        positions: Sequence[int] | None = None,
    ) -> None:
        """The states of a text's tokens at `positions`, by default from `first` on."""
        where = range(first, first + len(states)) if positions is None else positions
        places = np.array([[text] * len(states), [*where]], dtype=np.int64).reshape(2, -1)
        self._waiting = torch.cat([self._waiting, states.float()])
        self._places = np.concatenate([self._places, places], axis=1)
        while len(self._waiting) >= self.block_size:
            self._count(self.block_size)

    def arrays(self) -> dict[str, Array]:
        """All of it, as a survey holds it. Nothing may be added afterwards."""
        if len(self._waiting):
            self._count(len(self._waiting))
        return {
            **self._sums(),
            **self._top.arrays("top"),
            **self._sample.arrays("sample"),
            "active_feature": self._token_features,
        }

    def state(self) -> dict[str, Array]:
        """All that it takes to go on from here (`restore`)."""
        return {
            **self._sums(),
            **self._top.arrays("top", ranks=True),
            **self._sample.arrays("sample", ranks=True),
            "active_feature": self._token_features,
            "active_rank": self._token_rank,
            "waiting": self._waiting.numpy(),
            "places": self._places,
            "tokens": np.array([self.tokens]),
        }

    def restore(self, state: Mapping[str, Array]) -> None:
        """Goes on from `state`."""
        self._fired, self._total = state["fired"].copy(), state["total"].copy()
        self._largest, self._histogram = state["largest"].copy(), state["histogram"].copy()
        self._top.restore("top", state)
        self._sample.restore("sample", state)
        self._token_features, self._token_rank = state["active_feature"], state["active_rank"]
        self._waiting, self._places = torch.tensor(state["waiting"]), state["places"]
        self.tokens = int(state["tokens"][0])

    def _sums(self) -> dict[str, Array]:
        return {
            "fired": self._fired,
            "total": self._total,
            "largest": self._largest,
            "histogram": self._histogram,
        }

    def _count(self, size: int) -> None:
        """Encodes the first `size` waiting tokens and counts what fired."""
        block = torch.zeros(self.block_size, self._waiting.shape[1])
        block[:size] = self._waiting[:size]
        activations = self._encode(block)[:size].numpy()
        texts, positions = self._places[:, :size]
        self._waiting, self._places = self._waiting[size:], self._places[:, size:]
        self.tokens += size
        row, feature = np.nonzero(activations)  # token by token
        value = activations[row, feature]
        np.add.at(self._fired, feature, 1)
        np.add.at(self._total, feature, value.astype(np.float64))
        np.maximum.at(self._largest, feature, value)
        np.add.at(self._histogram, (feature, bin_of(np.abs(value))), 1)
        text, position = texts[row], positions[row]
        self._top.offer(feature, -value.astype(np.float64), value, text, position)
        chance = chance_of(feature, text, position)
        self._sample.offer(feature, chance, value, text, position)
        self._count_tokens(activations, chance_of(texts, positions))

    def _count_tokens(self, activations: Array, chance: Array) -> None:
        """Keeps the most active features of a token, where it belongs to the sample."""
        kept = min(ACTIVE, self.d_sae)
        values, best = torch.from_numpy(activations).topk(kept, dim=1)
        features = np.full((len(activations), ACTIVE), ACTIVE_NONE, np.int32)
        features[:, :kept] = torch.where(values > 0, best, ACTIVE_NONE).numpy()
        features = np.concatenate([self._token_features, features])
        rank = np.concatenate([self._token_rank, chance])
        order = np.argsort(rank, kind="stable")[:TOKEN_SAMPLE]
        # In the order of the stream, so that nothing is moved while there is room.
        order.sort()
        self._token_features, self._token_rank = features[order], rank[order]
