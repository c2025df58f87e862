"""How much: multiples of the stored vector, shares of a norm, or what a calibrated card tells."""

from __future__ import annotations

import math
from typing import Annotated, Any, Literal, TypeAlias, get_args, get_origin

from pydantic import (
    BaseModel,
    BeforeValidator,
    Discriminator,
    Field,
    Tag,
)

from steer.errors import quoted
from steer.spec.base import Frozen, Number


def _check_strength(value: Any) -> Any:
    if isinstance(value, str) and value in _STRENGTH_WORDS:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float | dict | BaseModel):
        objects = ", ".join(f'{{"{key}": x}}' for key in STRENGTH_KEYS)
        raise ValueError(
            f"{quoted(value)} is not a strength: give a number (multiples of the stored vector), "
            + " or ".join([objects, *(f'"{word}"' for word in _STRENGTH_WORDS)])
        )
    if isinstance(value, dict) and "ramp" in value:
        raise ValueError(
            "a ramp is a field beside 'strength', whose factors multiply it: "
            '{"strength": 2, "ramp": [[0, 0], [32, 1]]}'
        )
    if isinstance(value, dict) and set(value) not in [{key} for key in STRENGTH_KEYS]:
        raise ValueError(
            f"a strength object has exactly one of the keys {', '.join(STRENGTH_KEYS)}; "
            f"got {quoted(sorted(value, key=str)[:8])}"
        )
    if isinstance(value, int | float) and not math.isfinite(value):
        raise ValueError(f"strength {value!r} is not a finite number")
    return value


def _strength_tag(value: Any) -> str:
    tags = {"norm": "a norm", "kl": "a kl", "effect": "an effect"}
    if isinstance(value, str):
        return "auto"
    if isinstance(value, dict):
        return next(tags[key] for key in value)
    models: dict[type, str] = {
        NormStrength: "a norm",
        KLStrength: "a kl",
        EffectStrength: "an effect",
    }
    return models.get(type(value), "a number")


class NormStrength(Frozen):
    """A fraction of the token's own norm: the edit has length norm · ‖x‖."""

    norm: Number


class KLStrength(Frozen):
    """The strength at which the next-token distribution moves by `kl` nats (needs a calibrated
    card)."""

    kl: Annotated[Number, Field(gt=0)]


class EffectStrength(Frozen):
    """The strength that reaches this share of the attribute's range (needs a calibrated card)."""

    effect: Number


Strength: TypeAlias = Annotated[
    Annotated[Number, Tag("a number")]
    | Annotated[NormStrength, Tag("a norm")]
    | Annotated[KLStrength, Tag("a kl")]
    | Annotated[EffectStrength, Tag("an effect")]
    | Annotated[Literal["auto"], Tag("auto")],
    Discriminator(_strength_tag),
    BeforeValidator(_check_strength),
]


def _strength_forms() -> tuple[list[str], list[str]]:
    """The keys and the words that state a strength, read off the union that parses them."""
    keys: list[str] = []
    words: list[str] = []
    for member in get_args(get_args(Strength)[0]):
        form = get_args(member)[0]
        if isinstance(form, type) and issubclass(form, BaseModel):
            keys.extend(form.model_fields)
        elif get_origin(form) is Literal:
            words.extend(get_args(form))
    return keys, words


STRENGTH_KEYS, _STRENGTH_WORDS = _strength_forms()
STRENGTH_UNITS = ("multiple", *STRENGTH_KEYS, *_STRENGTH_WORDS)
"""What a strength may be given in: multiples of the stored vector (a plain number), the key of an
object, or a word."""
