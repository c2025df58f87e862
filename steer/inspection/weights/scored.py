"""Tokens by name, with their scores."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Engine
from steer.inspection.weights.result import NamedToken, ScoredToken
from steer.inspection.weights.vocabulary import Vocabulary
from steer.prompts import token_texts


def named_tokens(engine: Engine, tokens: Sequence[int]) -> list[NamedToken]:
    texts = token_texts(engine.tokenizer, tokens)
    return [NamedToken(token=text, id=token) for text, token in zip(texts, tokens, strict=True)]


def scored(
    engine: Engine, tokens: Sequence[int], scores: Iterable[float]
) -> tuple[ScoredToken, ...]:
    named = named_tokens(engine, tokens)
    return tuple(
        ScoredToken(token=one.token, id=one.id, score=score)
        for one, score in zip(named, scores, strict=True)
    )


def highest_tokens(
    vocabulary: Vocabulary, vectors: Sequence[Float[Tensor, " d_model"]], count: int
) -> list[tuple[ScoredToken, ...]]:
    """The `count` tokens with the greatest scores of each of `vectors`, best first."""
    if not vectors:
        return []
    found = []
    for _, scores in vocabulary.pieces(torch.stack(list(vectors))):
        best = scores.topk(min(count, scores.shape[-1]))
        found += [
            scored(vocabulary.engine, ids, values)
            for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]
    return found
