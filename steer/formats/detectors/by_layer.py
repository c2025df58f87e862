"""Files with a probe for each of several layers, of which a detector is one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from steer.errors import SteerError, quoted
from steer.formats.arrays import row_place
from steer.formats.options import ImportOptions

T = TypeVar("T")


def of_stated_layer(held: Mapping[Any, T], options: ImportOptions) -> tuple[int, T] | None:
    """The layer that the sender states, or the only one there is, and what is held for it; None
    where a key numbers no layer (as 12, "12" and "layer_12" do), or two the same.

    Raises `SteerError` where several could be meant, or one that is not there.
    """
    by_layer = {layer: one for key, one in held.items() if (layer := _layer_of(key)) is not None}
    if not by_layer or len(by_layer) < len(held):
        return None
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
