"""What an adapter holds for one layer, in the two forms in which adapters are written."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor


class EditRows(NamedTuple):
    """k rank-1 edits x + Σ f(⟨read, x⟩ + bias) · write: `read` and `write` `[k, d]`, `bias` `[k]`.

    f(u) is u where that exceeds `threshold` `[k]`, else 0 (0 makes it a ReLU); without a threshold
    it is u.
    """

    read: Tensor
    write: Tensor
    bias: Tensor
    threshold: Tensor | None = None

    @property
    def edits(self) -> EditRows:
        return self


class LoReFTRows(NamedTuple):
    """x + Rᵀ(Wx + b − Rx) (2404.03592): R `[r, d]`, W `[r, d]` and b `[r]`."""

    rotation: Tensor
    weight: Tensor
    bias: Tensor

    @property
    def edits(self) -> EditRows:
        return EditRows(self.weight - self.rotation, self.rotation, self.bias)


AdapterPart: TypeAlias = EditRows | LoReFTRows


def part_of(tensors: AdapterPart | tuple[Tensor, Tensor, Tensor]) -> AdapterPart:
    """`tensors` in their form; three without a name are LoReFT's."""
    return tensors if isinstance(tensors, EditRows | LoReFTRows) else LoReFTRows(*tensors)


def part_among(tensors: Mapping[str, Tensor], layer: int) -> AdapterPart:
    """The part of `layer` among the tensors of a file."""
    start = f"layers.{layer}."
    named = {k.removeprefix(start): tensor for k, tensor in tensors.items() if k.startswith(start)}
    return (LoReFTRows if "rotation" in named else EditRows)(**named)


def named_tensors(part: AdapterPart) -> dict[str, Tensor]:
    """The tensors of `part`, called as in a file."""
    return {name: tensor for name, tensor in part._asdict().items() if tensor is not None}


def part_fault(part: AdapterPart) -> str | None:
    """How the shapes of `part` disagree; None where they do not."""
    shapes = {name: list(tensor.shape) for name, tensor in named_tensors(part).items()}
    (first, rows), (second, others), *vectors = shapes.items()
    if len(rows) == 2 and rows == others and all(shape == rows[:1] for _, shape in vectors):
        return None
    told = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
    return f"{told}: {first} and {second} must be [k, d], the others [k]"
