"""The architectures that can be run; every other one is refused by name."""

from __future__ import annotations

from steer.artefacts.sae.architecture import Architecture
from steer.artefacts.sae.jumprelu import JUMPRELU
from steer.artefacts.sae.pursuit import PURSUIT
from steer.artefacts.sae.relu import RELU
from steer.artefacts.sae.topk import ABSTOPK, GROUPMAX, TOPK
from steer.errors import Unsupported

ARCHITECTURES: tuple[Architecture, ...] = (RELU, JUMPRELU, TOPK, GROUPMAX, ABSTOPK, PURSUIT)
SUPPORTED: tuple[str, ...] = tuple(one.name for one in ARCHITECTURES)

_WHY_NOT = {
    "crosscoder": "it reads several layers at once",
    "gated": "read from its file, it becomes the jumprelu that it equals",
    "temporal": "its features depend on the tokens before, which a token's own state does not tell",
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
        f"supported are {', '.join(SUPPORTED)} (BatchTopK, Matryoshka and gated as jumprelu)",
        code="unsupported_architecture",
    )
