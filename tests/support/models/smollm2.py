"""SmolLM2-135M-Instruct, fetched and converted once into this machine's cache."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from steer.engines.transformers.checkpoints.found import find_model, known_file
from steer.engines.transformers.checkpoints.known import SMOLLM2


@cache
def smollm2_folder() -> Path:
    """The model's folder, which both engines load; the network is used the first time alone."""
    return Path(find_model(SMOLLM2.name).location)


@cache
def smollm2_file() -> Path:
    """The GGUF file that the folder was made from."""
    return known_file(SMOLLM2)
