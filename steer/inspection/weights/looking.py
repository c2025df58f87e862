"""What a head looks for: the scores of a token's query with other tokens' keys (2209.02535).

Queries and keys are what the attention itself is handed of the tokens' embeddings, each put before
the block as the first token of a sequence: with the block's norm, with biases, and with norms of
queries and keys where a model has them. A rotary embedding turns tokens against each other by their
distance; here that is 0. What a score means for the weight of a token depends on the others, and
on masks, windows, caps and sinks.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Engine
from steer.inspection.weights.embeddings import Embeddings
from steer.inspection.weights.pairs import spread_of, strongest_pairs
from steer.inspection.weights.vocabulary import standings

_DRAWS, _TURNS = 32, 4
_NUMBERS_AT_ONCE = 1 << 27
"""Of a table's heads so many as fit into 1 GiB, their queries and keys."""


class Looks(NamedTuple):
    """One head's, float32; their product is the score before the weights are made."""

    keys: Float[Tensor, "vocab head_dim"]
    queries: Float[Tensor, "vocab head_dim"]


def looks_of(engine: Engine, embeddings: Embeddings, layer: int, head: int) -> Looks:
    """Those of one head."""
    (found,) = _looks(engine, embeddings, layer, range(head, head + 1))
    return found


def looks_of_heads(engine: Engine, embeddings: Embeddings, layer: int) -> Iterator[Looks]:
    """Those of all heads of a layer, in their order."""
    count = engine.info.n_heads or 1
    numbers = 2 * engine.info.vocab_size * engine.info.d_model // count
    step = max(1, _NUMBERS_AT_ONCE // numbers)
    for start in range(0, count, step):
        yield from _looks(engine, embeddings, layer, range(start, min(start + step, count)))


def _looks(engine: Engine, embeddings: Embeddings, layer: int, heads: range) -> list[Looks]:
    keys, queries = [], []
    chosen = slice(heads.start, heads.stop)
    for _, rows in embeddings.pieces():
        found = engine.queries_and_keys(layer, rows)
        keys.append(found.keys[:, chosen].clone())
        queries.append(found.queries[:, chosen].clone())
    every = torch.cat(keys).unbind(1), torch.cat(queries).unbind(1)
    return [Looks(*one) for one in zip(*every, strict=True)]


def strongest_of(
    keys: Float[Tensor, "vocab head_dim"], queries: Float[Tensor, "vocab head_dim"]
) -> float:
    """By how many deviations the strongest pair lies from the mean of all."""
    spread = spread_of(keys, queries)
    ends = [pair.score for pairs in strongest_pairs(keys, queries, 1) for pair in pairs]
    return max(abs(score - spread.mean) for score in ends) / max(spread.deviation, 1e-30)


def strongest_by_chance(
    keys: Float[Tensor, "vocab head_dim"], queries: Float[Tensor, "vocab head_dim"]
) -> float:
    """The most that some random turns of the keys give: queries and keys are as long and as spread
    as they are, and mean nothing to each other."""
    width, generator = keys.shape[1], torch.Generator().manual_seed(0)
    turns = [
        torch.linalg.qr(torch.randn(width, width, generator=generator)).Q for _ in range(_TURNS)
    ]
    return max(strongest_of(keys @ turn, queries) for turn in turns)


def sought_by_chance(keys: Float[Tensor, "vocab head_dim"]) -> float:
    """By how many deviations the token stands out that is sought most by the best of some random
    queries."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_DRAWS, keys.shape[1], generator=generator)
    return float(standings((drawn @ keys.T).double()).abs().max())
