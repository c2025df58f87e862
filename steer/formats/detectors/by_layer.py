"""Files with a probe for each of several layers, of which a detector is one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

from steer.errors import SteerError, quoted
from steer.formats.arrays import row_place
from steer.formats.options import ImportOptions

T = TypeVar("T")


def layers_of(keys: Iterable[Any]) -> dict[Any, int] | None:
    """The layer that each key numbers (12, "12", "layer_12"), or None where one numbers none, or
    two the same."""
    found = {key: _layer_of(key) for key in keys}
    layers = [layer for layer in found.values() if layer is not None]
    if not layers or len(set(layers)) != len(found):
        return None
    return {key: layer for key, layer in found.items() if layer is not None}


def of_layer(by_layer: Mapping[int, T], options: ImportOptions) -> tuple[int, T]:
    """The layer that the sender states, or the only one there is, and what is there for it. Raises
    `SteerError` where several could be meant, or one that is not there."""
    wanted = options.layers or tuple(by_layer)
    if len(wanted) != 1 or wanted[0] not in by_layer:
        raise SteerError(
            f"the file holds probes for the layers {quoted(sorted(by_layer), 200)}: state in "
            "'layers' the one that is meant",
            code="layer_required",
            param="/layers",
        )
    return wanted[0], by_layer[wanted[0]]


def _layer_of(key: Any) -> int | None:
    if type(key) is int:
        return key if key >= 0 else None
    place = row_place(str(key))
    return None if place is None else place[0]
