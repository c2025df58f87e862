"""The models and artefacts that come with Steer."""

from __future__ import annotations

from pathlib import Path

from steer_vectors import LIBRARY

from steer.registry.registry import Registry
from steer.registry.shipped import add_library

DEMO_MODEL = "steer-demo"


def model_location(model: str) -> str:
    """Where to load `model` from: a shipped model's folder, otherwise `model` itself."""
    return str(LIBRARY / "demo" / "model") if model == DEMO_MODEL else model


def shipped_model(location: str) -> str | None:
    """The name of the shipped model that lies at `location`; None for any other."""
    ours = Path(model_location(DEMO_MODEL))
    place = Path(location)
    return (
        DEMO_MODEL if location == DEMO_MODEL or (place.is_dir() and place.samefile(ours)) else None
    )


def register(registry: Registry, model: str) -> int:
    """Registers what is shipped for `model`, profiles included, unless it has been replaced or
    removed; how many artefacts are new. A registry that cannot be written stays as it is."""
    if model != DEMO_MODEL or registry.read_only:
        return 0
    return len(add_library(registry, LIBRARY / "demo"))
