"""Whole modules of torch in pickles (`torch.save(probe)`), as the state_dict they would give.

A module keeps its parameters, buffers and inner modules in its state. What its `forward` does with
them is not in the file, as it is in none that holds a state_dict.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from steer.formats.guards.pickle_machine import Instance

_PARTS = ("_parameters", "_buffers")
_INNER = "_modules"
_MATRIX = 2


def with_state_dicts(found: Any) -> Any:
    """What a file held, with a dictionary of its tensors in the place of each module."""
    if isinstance(found, Instance) and _is_module(found):
        return dict(_state_dict(found))
    if isinstance(found, dict):
        return {key: with_state_dicts(one) for key, one in found.items()}
    if isinstance(found, list | tuple):
        return [with_state_dicts(one) for one in found]
    return found


def _is_module(found: Instance) -> bool:
    return all(isinstance(found.state.get(name), dict) for name in (*_PARTS, _INNER))


def _state_dict(module: Instance, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Names and tensors, in the order of torch; of a layer without a bias one of zeros, which tells
    it from a direction."""
    own = [
        (f"{prefix}{name}", one)
        for part in _PARTS
        for name, one in module.state[part].items()
        if isinstance(one, Tensor)
    ]
    weight, bias = (module.state["_parameters"].get(name, "none") for name in ("weight", "bias"))
    if isinstance(weight, Tensor) and weight.ndim == _MATRIX and bias is None:
        own.append((f"{prefix}bias", weight.new_zeros(len(weight))))
    for name, inner in module.state[_INNER].items():
        if isinstance(inner, Instance) and _is_module(inner):
            own += _state_dict(inner, f"{prefix}{name}.")
    return own
