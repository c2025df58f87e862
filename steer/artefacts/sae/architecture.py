"""What an SAE architecture is: how pre-activations become feature activations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


class Activation(Protocol):
    """Pre-activations `[..., d_sae]` to feature activations of the same shape.

    `threshold` is `[d_sae]` and `k` a count where the architecture has them, else None.
    """

    def __call__(self, pre: Tensor, *, threshold: Tensor | None, k: int | None) -> Tensor: ...


@dataclass(frozen=True)
class Architecture:
    """One architecture, under the name and aliases that SAELens files use for it.

    `competitive` says that a feature's activation depends on the other features of the token, so
    that it cannot be read from its own encoder row alone; `signed`, that activations may be
    negative; `grouped`, that features compete within groups alone, of which there are k;
    `iterative`, that they are found in steps (`steer.artefacts.sae.pursuit`) and not by
    `activation`.
    """

    name: str
    activation: Activation
    aliases: tuple[str, ...] = ()
    needs_threshold: bool = False
    needs_k: bool = False
    competitive: bool = False
    signed: bool = False
    grouped: bool = False
    iterative: bool = False
    source: str = ""
