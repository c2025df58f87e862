"""The job that is measured: held-out chats of the demo, and additions of random directions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from steer_vectors import LIBRARY

from benchmarks.smollm2.job import Chat, Edit, Job
from steer.artefacts.control_vector import ControlVector
from steer.engines.transformers.checkpoints.found import find_model, is_gguf, known_file
from steer.formats.vectors.gguf import write_gguf
from steer.prompts import chat_tokens
from steer.registry.registry import Registry

LAYERS = tuple(range(12, 19))
VECTORS = 4
NORM = 12.0
"""Of a direction at one layer; the residual stream's is 150 to 200 there."""


def model_files(model: str) -> tuple[str, Path | None]:
    """The model as a folder, and the GGUF file that it was made from, if it was."""
    found, path = find_model(model), Path(model)
    if is_gguf(path):
        return found.location, path
    if found.known is None or found.known.source is None:
        return found.location, None
    return found.location, known_file(found.known)


def make(model: str, folder: Path, *, dtype: str, chats: int, tokens: int, specs: int) -> Job:
    """A job for `model`; its directions, of a fixed seed, lie in a registry and a file below
    `folder`."""
    from transformers import AutoConfig, AutoTokenizer, GenerationConfig  # noqa: PLC0415

    vectors = _vectors(AutoConfig.from_pretrained(model).hidden_size)
    with Registry.open(folder / "registry") as registry:
        for name, vector in vectors.items():
            registry.add(name, vector)
    chosen = [(f"direction-{n % VECTORS}", round(0.6 + 0.05 * n, 3)) for n in range(specs)]
    file = folder / "vector.gguf"
    write_gguf(vectors[chosen[0][0]], file)
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    ends = GenerationConfig.from_pretrained(model).eos_token_id
    asked = _chats(chats)
    return Job(
        model=model,
        dtype=dtype,
        tokens=tokens,
        chats=asked,
        prompts=[list(chat_tokens(tokenizer, chat)) for chat in asked],
        specs=[_spec(name, strength) for name, strength in chosen],
        edits=[_edit(vectors[name], strength) for name, strength in chosen],
        registry=str(folder / "registry"),
        vector=(str(file), chosen[0][1]),
        ends=[ends] if isinstance(ends, int) else list(ends),
    )


def _vectors(width: int) -> dict[str, ControlVector]:
    generator = torch.Generator().manual_seed(0)

    def direction() -> torch.Tensor:
        return NORM * torch.nn.functional.normalize(torch.randn(width, generator=generator), dim=0)

    return {
        f"direction-{n}": ControlVector.of({layer: direction() for layer in LAYERS})
        for n in range(VECTORS)
    }


def _spec(name: str, strength: float) -> dict[str, Any]:
    return {
        "interventions": [{"kind": "add", "vector": name, "strength": strength}],
        "where": {"phases": ["prompt", "generation"]},
    }


def _edit(vector: ControlVector, strength: float) -> Edit:
    return {layer: (strength * vector[layer]).tolist() for layer in LAYERS}


def _chats(count: int) -> list[Chat]:
    lines = (LIBRARY / "demo" / "data" / "heldout.jsonl").read_text("utf-8").splitlines()
    found: list[Chat] = [json.loads(line)["messages"] for line in lines]
    return found[:: max(1, len(found) // count)][:count]
