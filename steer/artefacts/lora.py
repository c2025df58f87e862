"""Low-rank changes of a model's weights (LoRA, 2106.09685): W x + s·B(A x)."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from jaxtyping import Float
from safetensors.torch import save as save_safetensors
from torch import Tensor

from steer.artefacts.oracle_form import MAX_RANK
from steer.errors import FileFormatError


class LoraPart(NamedTuple):
    """What one linear module gains: `scale` · `up` (`down` x)."""

    down: Float[Tensor, "r d_in"]
    up: Float[Tensor, "d_out r"]
    scale: float


@dataclass(frozen=True, eq=False)
class Lora:
    """Parts by the module's name in the model, as `model.layers.0.self_attn.q_proj`.

    Guarantees: at least one part; finite, of one float type; both halves of a part have one rank,
    at most `MAX_RANK`.
    """

    parts: Mapping[str, LoraPart]

    @staticmethod
    def of(parts: Mapping[str, LoraPart]) -> Lora:
        """Checked parts, copied and in the order of their names. Raises `FileFormatError`."""
        if not parts:
            raise FileFormatError("a LoRA adapter changes at least one module; this one has none")
        return Lora({name: _copied(name, parts[name]) for name in sorted(parts)})

    @property
    def rank(self) -> int:
        """The largest rank of its parts."""
        return max(len(part.down) for part in self.parts.values())

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As they lie in a file: `lora.MODULE.down`, `.up` and `.scale`."""
        found: dict[str, Tensor] = {}
        for name, part in self.parts.items():
            found[f"lora.{name}.down"], found[f"lora.{name}.up"] = part.down, part.up
            found[f"lora.{name}.scale"] = torch.tensor(part.scale)
        return found

    @cached_property
    def sha256(self) -> str:
        """The identity of these weights, whatever is said of them."""
        return hashlib.sha256(save_safetensors(self.tensors)).hexdigest()


def lora_from(tensors: Mapping[str, Tensor]) -> Lora:
    """The parts in tensors that are called as in `Lora.tensors`. Raises `FileFormatError`."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        name, _, half = key.removeprefix("lora.").rpartition(".")
        if not key.startswith("lora.") or not name or half not in LoraPart._fields:
            raise FileFormatError(
                f"the file has a card, but its tensor {key[:200]!r} is not named as a LoRA part "
                "(lora.MODULE.down, .up, .scale)"
            )
        found.setdefault(name, {})[half] = tensor
    parts = {}
    for name, halves in found.items():
        if set(halves) != set(LoraPart._fields) or halves["scale"].ndim:
            raise FileFormatError(
                f"{name[:200]} has {', '.join(sorted(halves))}; a LoRA part has down, up and a "
                "single scale"
            )
        parts[name] = LoraPart(halves["down"], halves["up"], float(halves["scale"]))
    return Lora.of(parts)


def _copied(name: str, part: LoraPart) -> LoraPart:
    down, up = (half.detach().cpu().contiguous().clone() for half in (part.down, part.up))
    shapes = f"{list(down.shape)} and {list(up.shape)}"
    if down.ndim != 2 or up.ndim != 2 or len(down) != up.shape[1] or not len(down):
        raise FileFormatError(
            f"{name[:200]}: the halves {shapes} are not [r, d_in] and [d_out, r] of one rank r"
        )
    if len(down) > MAX_RANK:
        raise FileFormatError(f"{name[:200]} has rank {len(down)}; at most {MAX_RANK} is served")
    finite = bool(down.isfinite().all()) and bool(up.isfinite().all())
    if not finite or not torch.tensor(part.scale).isfinite():
        raise FileFormatError(f"{name[:200]} contains NaN or Inf", code="not_finite")
    return LoraPart(down, up, float(part.scale))
