"""What every part of a spec is made of: numbers, names, layers, and models that do not change."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, TypeAlias, get_args

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
)
from pydantic_core import PydanticCustomError

from steer.spec.wording import layer_from_end

MAX_FEATURES = 256
MAX_INTEGER = 2**53 - 1
"""The largest integer of a spec: the last that all readers of JSON agree on (RFC 8259, 6)."""


Site: TypeAlias = Literal[
    "resid_pre",
    "resid_mid",
    "resid_post",
    "attn_out",
    "mlp_out",
    "mlp_act",
    "head_out",
    "attn_in",
    "mlp_in",
]
SITES: tuple[Site, ...] = get_args(Site)


_STORED_NAME = "[A-Za-z0-9][A-Za-z0-9._-]{0,127}"
_NAME = re.compile(_STORED_NAME + "(@[0-9a-f]{6,64})?")


def _no_negative_zero(value: float) -> float:
    return value + 0.0


def _check_name(value: str) -> str:
    if not _NAME.fullmatch(value):
        raise ValueError(
            f"{value!r} is not an artefact name: use letters, digits, '.', '_' and '-' "
            "(at most 128, no slashes), optionally followed by '@' and a hash"
        )
    return value


def check_name(value: str) -> str:
    """`value` as the name of something to be stored: as in a spec, without a hash.

    Raises `ValueError`.
    """
    if "@" in _check_name(value):
        raise ValueError(f"{value!r} ends in a hash: a stored name is only the part before '@'")
    return value


def values_tag(value: Any) -> str:
    return "numbers" if isinstance(value, list | tuple) else "a number"


def _from_the_front(value: Any) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and -MAX_INTEGER <= value < 0:
        raise PydanticCustomError("negative_layer", "{said}", {"said": layer_from_end(value)})
    return value


def check_layers_form(value: Any) -> Any:
    """`value`, unless it is neither a list nor "all"."""
    if value == "all" or isinstance(value, list | tuple):
        return value
    if isinstance(value, int) and not isinstance(value, bool):
        raise PydanticCustomError(
            "layers_form", "a list is needed, or 'all': write [{layer}]", {"layer": value}
        )
    raise PydanticCustomError("layers_form", "a list is needed, or 'all'")


def layers_tag(value: Any) -> str:
    return "a word" if value == "all" else "numbers"


def _sorted_layers(value: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sorted(set(value)))


Number: TypeAlias = Annotated[
    float, Field(strict=True, allow_inf_nan=False), AfterValidator(_no_negative_zero)
]
Index: TypeAlias = Annotated[int, Field(strict=True, ge=0, le=MAX_INTEGER)]
Bound: TypeAlias = Annotated[int, Field(strict=True, ge=-MAX_INTEGER, le=MAX_INTEGER)]
Name: TypeAlias = Annotated[
    str,
    AfterValidator(_check_name),
    Field(json_schema_extra={"pattern": f"^{_NAME.pattern}$"}),
]
StoredName: TypeAlias = Annotated[
    str,
    AfterValidator(check_name),
    Field(json_schema_extra={"pattern": f"^{_STORED_NAME}$"}),
]
OneEach: TypeAlias = Annotated[
    tuple[Number, ...], Field(min_length=1, max_length=MAX_FEATURES, fail_fast=True)
]
Values: TypeAlias = Annotated[
    Annotated[Number, Tag("a number")] | Annotated[OneEach, Tag("numbers")],
    Discriminator(values_tag),
]
Layer: TypeAlias = Annotated[Index, BeforeValidator(_from_the_front)]
"""A block, from 0. One counted from the end is refused: what a stored spec means must not depend
on the model that reads it, and `hidden_states[-1]` is behind the final norm, which no block is."""
Layers: TypeAlias = Annotated[
    tuple[Layer, ...],
    Field(min_length=1, max_length=1024, fail_fast=True),
    AfterValidator(_sorted_layers),
]
LayersOrAll: TypeAlias = Annotated[
    Annotated[Layers, Tag("numbers")] | Annotated[Literal["all"], Tag("a word")],
    Discriminator(layers_tag),
    BeforeValidator(check_layers_form),
]
"""Some layers, or all that there can be: of an artefact with rows its own, else the model's."""


def exactly_one(*names: str) -> dict[str, Any]:
    """For the JSON schema of an object in which one of `names` must be there and not null."""
    given = [
        {"required": [name], "properties": {name: {"not": {"type": "null"}}}} for name in names
    ]
    return {"oneOf": given}


class Frozen(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)
