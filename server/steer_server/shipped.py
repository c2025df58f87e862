"""The models and artefacts that come with Steer."""

from __future__ import annotations

from pathlib import Path

from steer_vectors import LIBRARY

from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.registry.registry import Registry

DEMO_MODEL = "steer-demo"


def model_location(model: str) -> str:
    """Where to load `model` from: a shipped model's folder, otherwise `model` itself."""
    return str(LIBRARY / "demo" / "model") if model == DEMO_MODEL else model


def artefact_files(model: str) -> list[Path]:
    """The files of the artefacts shipped for `model`: `<kind>/<name>.safetensors`."""
    if model != DEMO_MODEL:
        return []
    folder = LIBRARY / "demo"
    return sorted(f for f in folder.glob("*/*.safetensors") if f.parent.name != "model")


def register(registry: Registry, model: str) -> int:
    """Registers what is shipped for `model`, unless it has been replaced or removed; how many."""
    added = 0
    for file in artefact_files(model):
        artefact = read_artefact(
            file, ImportOptions(), scratch=None, unpacked_limit=file.stat().st_size
        )
        added += registry.add_shipped(file.stem, artefact) is not None
    return added
