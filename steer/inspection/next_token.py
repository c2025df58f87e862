"""What a model would say next, read off logits."""

from __future__ import annotations

from typing import Annotated, Any, TypeAlias

from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from steer.errors import SpecError
from steer.inspection.method import Finite
from steer.prompts import PromptReader, inner_tokens, part_tokens, token_texts
from steer.readouts.measures import likeliest

TokenChoice: TypeAlias = (
    Annotated[int, Field(strict=True, ge=0)] | Annotated[str, Field(min_length=1, max_length=256)]
)
"""A token by its id, or by a text that is this token and no other."""


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


def chosen_token(reader: PromptReader, choice: TokenChoice, *, param: str) -> int:
    """The id of the token that `choice` names, as it stands within a text, leading space and all.

    Raises `SpecError` at `param`: `token_out_of_range` for an id that the model has not,
    `not_one_token` for a text of several.
    """
    if isinstance(choice, int):
        if choice >= reader.info.vocab_size:
            raise SpecError(
                f"token {choice} is outside the vocabulary, which ends with "
                f"{reader.info.vocab_size - 1}",
                param=param,
                code="token_out_of_range",
            )
        return choice
    readings = [read(reader.tokenizer, choice) for read in (inner_tokens, part_tokens)]
    for ids in readings:
        if len(ids) == 1:
            return int(ids[0])
    pieces = list(token_texts(reader.tokenizer, readings[0]))
    raise SpecError(
        f"{choice!r} is {len(pieces)} tokens here, {pieces}: give one of them, with its space, or "
        "a token's id",
        param=param,
        code="not_one_token",
    )
