"""The architectures that can be run; every other one is refused by name."""

from __future__ import annotations

from steer.artefacts.sae.architecture import Architecture
from steer.artefacts.sae.jumprelu import JUMPRELU
from steer.artefacts.sae.relu import RELU
from steer.artefacts.sae.topk import TOPK
from steer.errors import Unsupported

ARCHITECTURES: tuple[Architecture, ...] = (RELU, JUMPRELU, TOPK)
SUPPORTED: tuple[str, ...] = tuple(one.name for one in ARCHITECTURES)

_WHY_NOT = {
    "abstopk": "its features are negative too, which thresholds and clamps here do not read",
    "gated": "its gate and its magnitude are two different reads",
    "matching_pursuit": "its encoder is a loop over the dictionary",
    "temporal": "its features depend on the tokens before",
    "transcoder": "it maps one site to another, so it has no reconstruction error to keep",
}


def architecture_named(name: str) -> Architecture:
    """The architecture with this name or alias, in upper or lower case.

    Raises `Unsupported` (`unsupported_architecture`) for any other.
    """
    wanted = name.lower()
    for one in ARCHITECTURES:
        if wanted == one.name or wanted in one.aliases:
            return one
    why = next((f": {text}" for part, text in _WHY_NOT.items() if part in wanted), "")
    raise Unsupported(
        f"the SAE architecture {name!r} is not supported{why}; "
        f"supported are {', '.join(SUPPORTED)} (BatchTopK and Matryoshka as jumprelu)",
        code="unsupported_architecture",
    )
