"""The transformers engine: against itself unsteered, against `generate`, and against the number of
distinct specs and of registered vectors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.timing import Figures, interleaved, paired_ratio
from benchmarks.workload import CHATS, MODEL, TOKENS, mixed_specs, prompts, requests, specs, vectors
from steer.artefacts.control_vector import ControlVector
from steer.engines.base import GenerationRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.registry.registry import Registry

Row = tuple[str, str, str, str]
"""What was measured, tokens per second, ratio to the unsteered engine, aim."""


def run(rounds: int) -> list[Row]:
    """Tokens per second of 64 chats × 32 tokens in one batch."""
    with (
        TransformersEngine.load(MODEL, name="steer-demo") as engine,
        tempfile.TemporaryDirectory() as folder,
    ):
        few, many = _registry(Path(folder) / "few", 10), _registry(Path(folder) / "many", 10_000)
        work = {
            "engine, nothing steered": requests(engine, []),
            "1 distinct spec": requests(engine, specs(1)),
            "16 distinct specs": requests(engine, specs(16)),
            "64 distinct specs": requests(engine, specs(64)),
            "16 specs that read the stream": requests(engine, mixed_specs(16)),
            "16 specs, 10 registered vectors": requests(engine, specs(16), few),
            "16 specs, 10,000 registered vectors": requests(engine, specs(16), many),
        }
        contestants = {name: _completing(engine, batch) for name, batch in work.items()}
        contestants["plain padded generate, nothing steered"] = _plain(engine)
        found = interleaved(contestants, rounds=rounds, title="engine")
    return _rows(found)


def _rows(found: dict[str, Figures]) -> list[Row]:
    base = found["engine, nothing steered"]
    aims = {"16 distinct specs": "≥ .97"}
    rows = [
        (name, str(figures), paired_ratio(figures, base), aims.get(name, ""))
        for name, figures in found.items()
    ]
    plain = found["plain padded generate, nothing steered"]
    ratio = paired_ratio(found["16 distinct specs"], plain)
    rows.append(("16 distinct specs / plain padded generate", "", ratio, "≥ .8"))
    few, many = (
        found["16 specs, 10 registered vectors"],
        found["16 specs, 10,000 registered vectors"],
    )
    rows.append(("10,000 / 10 registered vectors", "", paired_ratio(many, few), "flat"))
    return rows


def _completing(
    engine: TransformersEngine, batch: Sequence[GenerationRequest]
) -> Callable[[], float]:
    def work() -> float:
        return float(sum(len(done.tokens) for done in engine.complete(batch)))

    return work


def _plain(engine: TransformersEngine) -> Callable[[], float]:
    """One padded `generate` of the whole batch on a model that Steer never touched."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    chats = prompts(engine)
    width = max(map(len, chats))
    ids = torch.tensor([[0] * (width - len(chat)) + list(chat) for chat in chats])
    mask = torch.tensor([[0] * (width - len(chat)) + [1] * len(chat) for chat in chats])

    @torch.inference_mode()
    def work() -> float:
        out = model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=TOKENS,
            min_new_tokens=TOKENS,
            do_sample=False,
            pad_token_id=0,
        )
        return float(CHATS * (out.shape[1] - width))

    return work


def _registry(folder: Path, count: int) -> Registry:
    """A registry with the demo's vectors and as many others as make `count`."""
    registry = Registry.open(folder)
    for name, vector in vectors().items():
        registry.add(name, vector)
    generator = torch.Generator().manual_seed(0)
    for n in range(count - len(vectors())):
        row = torch.randn(192, generator=generator)
        registry.add(f"other-{n}", ControlVector.of({4: row}))
    return registry
