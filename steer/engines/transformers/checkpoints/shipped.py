"""What comes with Steer for a model, offered to the registry at every start."""

from __future__ import annotations

from steer.engines.transformers.checkpoints.found import known_model
from steer.registry.registry import Registry
from steer.registry.shipped import add_library


def names_of(model: str) -> tuple[str, ...]:
    """All that the model which `model` names may be called, as far as it is known before it is
    loaded; its own name first."""
    known = known_model(model)
    return (model,) if known is None else (known.own_name, known.name)


def add_shipped(registry: Registry, model: str) -> int:
    """Registers what is shipped for `model`, profiles included, unless it has been replaced or
    removed; how many artefacts are new.

    Nothing is fetched or converted for it. A model that Steer does not know has nothing, and a
    registry that cannot be written stays as it is.
    """
    known = known_model(model)
    if known is None or registry.read_only or not known.shipped.is_dir():
        return 0
    return len(add_library(registry.for_model(*names_of(model)), known.shipped))
