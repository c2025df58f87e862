"""Finding the decoder layers of a vLLM model, its text model if it is one of several parts."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from steer.engines.vllm.taps.families import FAMILIES, Family
from steer.errors import Unsupported

_MISSING = "PPMissingLayer"
"""vLLM's stand-in for what another pipeline stage owns."""


@dataclass(frozen=True)
class TextDecoder:
    """The layers that this worker has, by their number among all `n_layers`, in forward order.

    `owner` is the module that runs them, a part of `model`; `family` is None where nobody has read
    these layers.
    """

    model: nn.Module
    owner: nn.Module
    layers: list[tuple[int, nn.Module]]
    n_layers: int
    family: Family | None

    @property
    def ends_here(self) -> bool:
        """Whether this worker has the last layer."""
        return self.layers[-1][0] == self.n_layers - 1


def find_decoder(model: nn.Module, n_layers: int) -> TextDecoder:
    """The decoder of `model`. Raises `Unsupported` where there is none, or more than one."""
    if not hasattr(model, "compute_logits"):
        raise unsupported(model, "it computes no logits, so it does not generate text")
    owner, modules = _only_stack(model, n_layers)
    layers = [(n, one) for n, one in enumerate(modules) if not is_missing(one)]
    return TextDecoder(model, owner, layers, n_layers, _family(owner, layers))


def is_missing(module: nn.Module) -> bool:
    """Whether another pipeline stage has what should be here."""
    return type(module).__name__ == _MISSING


def class_path(module: nn.Module) -> str:
    """The full name of the class of `module`."""
    kind = type(module)
    return f"{kind.__module__}.{kind.__qualname__}"


def unsupported(model: nn.Module, reason: str) -> Unsupported:
    """The refusal of `model` for `reason`."""
    return Unsupported(
        f"{type(model).__name__} cannot be steered on vLLM: {reason}. Use the transformers engine, "
        "or another model",
        code="unsupported_architecture",
    )


def failure(error: Exception) -> str:
    """What failed, and in which function: vLLM leaves out the words where a device lacks one."""
    (frame,) = traceback.extract_tb(error.__traceback__)[-1:]
    words = f": {error}" if str(error) else ""
    return f"{type(error).__name__} in {frame.name} of {Path(frame.filename).name}{words}"


def _only_stack(model: nn.Module, n_layers: int) -> tuple[nn.Module, nn.ModuleList]:
    language: Any = getattr(model, "get_language_model", lambda: model)()
    stacks = list(_stacks(language, n_layers))
    known = {family.owner for family in FAMILIES}
    found = [stack for stack in stacks if class_path(stack[0]) in known] or stacks
    if len(found) == 1:
        return found[0]
    names = ", ".join(f"those of {class_path(owner)}" for owner, _ in found)
    raise unsupported(
        model,
        f"it has more than one list of {n_layers} layers ({names})"
        if found
        else f"there is no list of {n_layers} layers in {class_path(language)}",
    )


def _stacks(model: nn.Module, n_layers: int) -> Iterator[tuple[nn.Module, nn.ModuleList]]:
    """The outermost lists of `n_layers` modules in `model`, with the module that owns each; of
    lists of the same modules the first."""
    seen: set[nn.Module] = set()
    for owner in model.modules():
        for child in owner.children():
            if isinstance(child, nn.ModuleList) and len(child) == n_layers and child[0] not in seen:
                yield owner, child
                seen |= {one for layer in child for one in layer.modules()}


def _family(owner: nn.Module, layers: list[tuple[int, nn.Module]]) -> Family | None:
    kinds = {class_path(layer) for _, layer in layers}
    for family in FAMILIES:
        if (
            family.owner == class_path(owner)
            and kinds == {family.layer}
            and _has(owner, family.owner_where)
            and all(_has(layer, family.where) for _, layer in layers)
            and all(family.layout.check(layer) is None for _, layer in layers)
        ):
            return family
    return None


def _has(module: nn.Module, values: dict[str, Any]) -> bool:
    return all(getattr(module, name, None) == value for name, value in values.items())
