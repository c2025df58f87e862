"""What a model would say next, read off logits."""

from __future__ import annotations

from typing import Any

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from steer.inspection.method import Finite
from steer.prompts import token_texts
from steer.readouts.measures import likeliest


class TokenChance(BaseModel):
    """A token and the probability it is given."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    id: int
    probability: Finite


def top_tokens(
    logits: Float[Tensor, "N vocab"], tokenizer: Any, count: int
) -> list[tuple[TokenChance, ...]]:
    """The `count` likeliest tokens of each row, best first; probabilities in float32."""
    best = likeliest(logits, count)
    rows = []
    for chances, ids in zip(best.values.tolist(), best.places.tolist(), strict=True):
        texts = token_texts(tokenizer, ids)
        rows.append(
            tuple(
                TokenChance(token=text, id=token, probability=chance)
                for text, token, chance in zip(texts, ids, chances, strict=True)
            )
        )
    return rows
