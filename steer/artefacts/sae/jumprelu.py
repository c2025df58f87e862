"""JumpReLU: f = a where a exceeds the feature's own threshold, else 0 (2407.14435).

BatchTopK (2412.06410) and Matryoshka (2503.17547) SAEs compete within a batch only while they
train; they are saved, and run, as JumpReLU.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from steer.artefacts.sae.architecture import Architecture
from steer.artefacts.sae.storage.rows import FeatureRows
from steer.errors import FileFormatError


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


def gated_as_jumprelu(
    encoder: FeatureRows,
    b_gate: Float[Tensor, " d_sae"],
    b_mag: Float[Tensor, " d_sae"],
    r_mag: Float[Tensor, " d_sae"],
) -> tuple[FeatureRows, dict[str, Tensor]]:
    """The JumpReLU that a gated SAE (2404.16014) is: encoder, and its `b_enc` and `threshold`.

        1[a + b_gate > 0] · ReLU(eʳ·a + b_mag),   a = ⟨row, x⟩

    Both sides of the gate times eʳ, it is open where eʳ·a + b_mag > b_mag − eʳ·b_gate: the
    magnitude tells the gate.
    """
    if not b_gate.shape == b_mag.shape == r_mag.shape == (encoder.shape[0],):
        raise FileFormatError(
            f"b_gate, b_mag and r_mag have the shapes {list(b_gate.shape)}, {list(b_mag.shape)} "
            f"and {list(r_mag.shape)}; the SAE has {encoder.shape[0]} features",
            code="mixed_widths",
        )
    gain = r_mag.double().exp()
    threshold = (b_mag.double() - gain * b_gate.double()).clamp(min=0.0)
    vectors = {"b_enc": b_mag.float(), "threshold": threshold.float()}
    return encoder.scaled_by(gain.float()), vectors
