"""pydantic's complaints in the words of somebody who sees JSON: no tuples, no classes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_LISTS = frozenset({"list_type", "tuple_type", "set_type", "frozen_set_type", "iterable_type"})
_OBJECTS = frozenset({"dict_type", "mapping_type", "model_type", "model_attributes_type"})
_PLAIN: Mapping[str, str] = {
    **dict.fromkeys(_LISTS, "a list is needed"),
    **dict.fromkeys(_OBJECTS, 'an object is needed, {"name": value, …}'),
    **dict.fromkeys(("string_type", "string_sub_type"), "a text is needed"),
    **dict.fromkeys(("int_type", "int_parsing", "int_from_float"), "a whole number is needed"),
    **dict.fromkeys(("float_type", "float_parsing"), "a number is needed"),
    **dict.fromkeys(("bool_type", "bool_parsing"), "true or false is needed"),
}


_FROM_END = "is counted from the model's end: layers are numbered from 0, the first block, so write"
_UNKNOWN = "the number of the model's layers less"
_LAYER_FROM_END = re.compile(rf"(?<={_FROM_END} ){_UNKNOWN} (\d+)")


def layer_from_end(layer: int) -> str:
    """What is said of a layer below 0, where nobody knows yet how many the model has."""
    return f"layer {layer} {_FROM_END} {_UNKNOWN} {-layer}"


def numbered_from_end(message: str, n_layers: int) -> str:
    """`message` with the numbers that `layer_from_end` left open, of a model with `n_layers`."""

    def number(found: re.Match[str]) -> str:
        layer = n_layers - int(found[1])
        return str(layer) if layer >= 0 else f"one from 0 to {n_layers - 1}"

    return _LAYER_FROM_END.sub(number, message)


def in_json_words(item: Mapping[str, Any]) -> str:
    """What `item`, one of the errors of a `ValidationError`, says is needed."""
    kind, context = item["type"], item.get("ctx", {})
    if kind in _PLAIN:
        return _PLAIN[kind]
    if kind == "too_short":
        return f"a list of at least {context['min_length']} is needed"
    if kind == "too_long":
        return f"a list of at most {context['max_length']} is needed"
    if kind == "literal_error":
        expected: str = context["expected"]
        several = " or " in expected
        return f"one of {expected} is needed" if several else f"the only word here is {expected}"
    message: str = item["msg"]
    return message.removeprefix("Value error, ").replace("Input should be", "it should be")
