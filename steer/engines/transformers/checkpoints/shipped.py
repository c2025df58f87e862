"""What comes with Steer for a model, offered to the registry at every start."""

from __future__ import annotations

from steer.engines.transformers.checkpoints.found import known_model
from steer.registry.registry import Registry
from steer.registry.shipped import add_library


def add_shipped(registry: Registry, model: str) -> int:
    """Registers what is shipped for `model`, profiles included, unless it has been replaced or
    removed; how many artefacts are new.

    Nothing is fetched or converted for it. A model that Steer does not know has nothing, and a
    registry that cannot be written stays as it is.
    """
    known = known_model(model)
    if known is None or registry.read_only or not known.shipped.is_dir():
        return 0
    return len(add_library(registry, known.shipped))
