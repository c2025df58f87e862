"""The types of a request's fields: JSON as clients write it, checked and in one form."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

MAX_SEED = 2**63 - 1
MAX_STOPS = 32
MAX_STOP_TOKENS = 1024
MAX_BIASES = 4096


def _whole(value: Any) -> Any:
    # JSON has one kind of number: languages without integers write 16 as 16.0.
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _stops(value: Any) -> Any:
    if value is None or value == "":
        return ()
    return (value,) if isinstance(value, str) else value


def _off_where_not_positive(value: Any) -> Any:
    # vLLM and llama.cpp: -1 and 0 are every token.
    value = _whole(value)
    return None if type(value) is int and value in (-1, 0) else value


def _none_where_false(value: Any) -> Any:
    # The chat's way to ask for no log-probabilities, where a count belongs.
    return None if value is False else value


def _biases(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    pairs = []
    for key, bias in value.items():
        token = int(key) if key.isascii() and key.isdigit() and len(key) <= 12 else None
        if token is None:
            raise ValueError(f"logit_bias: {key[:40]!r} is not a token's id")
        pairs.append((token, bias))
    return tuple(pairs)


Finite = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Count = Annotated[int, BeforeValidator(_whole), Field(strict=True)]
Alternatives = Annotated[
    Annotated[Count, Field(ge=0, le=20)] | None,
    BeforeValidator(_none_where_false, json_schema_input_type=int | None),
]
TopK = Annotated[
    Annotated[int, Field(strict=True, ge=1)] | None,
    BeforeValidator(_off_where_not_positive, json_schema_input_type=int | None),
]
Penalty = Annotated[Finite, Field(ge=-2, le=2)]
Stop = Annotated[str, Field(min_length=1, max_length=256)]
Stops = Annotated[
    tuple[Stop, ...],
    Field(max_length=MAX_STOPS, fail_fast=True),
    BeforeValidator(
        _stops,
        json_schema_input_type=Annotated[str, Field(max_length=256)]
        | Annotated[list[Stop], Field(max_length=MAX_STOPS)]
        | None,
    ),
]
TokenId = Annotated[Count, Field(ge=0)]
LogitBias = Annotated[
    tuple[tuple[int, Annotated[Finite, Field(ge=-100, le=100)]], ...],
    Field(max_length=MAX_BIASES, fail_fast=True),
    BeforeValidator(_biases, json_schema_input_type=dict[str, float] | None),
]
