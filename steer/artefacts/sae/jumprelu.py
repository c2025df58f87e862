"""JumpReLU: f = a where a exceeds the feature's own threshold, else 0 (2407.14435).

BatchTopK (2412.06410) and Matryoshka (2503.17547) SAEs compete within a batch only while they
train; they are saved, and run, as JumpReLU.
"""

from __future__ import annotations

from torch import Tensor

from steer.artefacts.sae.architecture import Architecture


def activate(pre: Tensor, *, threshold: Tensor | None, k: int | None) -> Tensor:
    """`threshold` `[d_sae]`; a feature exactly at its threshold is off."""
    del k
    assert threshold is not None, "checked when the SAE was built"
    return pre.relu() * (pre > threshold)


JUMPRELU = Architecture(
    "jumprelu",
    activate,
    aliases=("batchtopk", "matryoshka_batchtopk", "matryoshka"),
    needs_threshold=True,
    source="2407.14435",
)
