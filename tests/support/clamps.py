"""What a clamp can be asked for, each with SAEs that read a token as it is, by its norm, or by the
deviation of its channels."""

from __future__ import annotations

from typing import Any

ARCHITECTURES = ("standard", "jumprelu", "topk")
NORMALISATIONS = {"": "none", "-rescaled": "constant_norm_rescale", "-centred": "layer_norm"}
SAE_NAMES = tuple(
    architecture + suffix for suffix in NORMALISATIONS for architecture in ARCHITECTURES
)

_EACH = [0.7, 0.0, 3.0, 1.0, 0.3]
_ADDED = [0.7, 0.1, -1.5, 1.0, -0.3]
MODES: dict[str, dict[str, Any]] = {
    "set": {"value": _EACH},
    "at_least": {"value": _EACH, "mode": "at_least"},
    "at_most": {"value": _EACH, "mode": "at_most"},
    "scale": {"value": _EACH, "mode": "scale"},
    "drop": {"mode": "drop"},
    "add": {"value": _ADDED, "mode": "add"},
    "add a share": {"value": {"norm": _ADDED}, "mode": "add"},
    "add in balance": {"value": _ADDED, "mode": "add", "balance": 1.5},
    "add a share in balance": {"value": {"norm": _ADDED}, "mode": "add", "balance": 0.4},
    "set where active": {"value": _EACH, "only_if_active": True},
    "set at least where active": {"value": _EACH, "mode": "at_least", "only_if_active": True},
    "set at most where active": {"value": -0.4, "mode": "at_most", "only_if_active": True},
    "add where active": {"value": _ADDED, "mode": "add", "only_if_active": True},
    "add a share in balance where active": {
        "value": {"norm": _ADDED}, "mode": "add", "balance": 0.4, "only_if_active": True,
    },
    "set a share": {"value": {"norm": _EACH}},
    "set at least a share": {"value": {"norm": 0.2}, "mode": "at_least"},
    "set at most a share where active": {
        "value": {"norm": 0.1}, "mode": "at_most", "only_if_active": True,
    },
}  # fmt: skip


def allowed(sae: str, mode: str) -> bool:
    """Whether there is such a clamp: a target that is a share of the norm is none of the
    deviation."""
    return not (sae.endswith("-centred") and mode.startswith("set") and "a share" in mode)


CLAMPS: dict[str, dict[str, Any]] = {
    f"clamp {mode} {sae}": {
        "kind": "clamp", "sae": sae, "features": [3, 60, 17, 8, 21], **MODES[mode],
    }
    for sae in SAE_NAMES
    for mode in MODES
    if allowed(sae, mode)
}  # fmt: skip
"""Over an SAE of `artefacts.artefacts`."""
