"""What loaded SAEs keep in memory: registered, searched, and clamped in one batch.

Their rows stay in their files (docs/saes.md#memory). Resident memory and its peak are read from the
system after every step, and are stated for each SAE. The files hold random rows and are deleted.
"""

from __future__ import annotations

import ctypes
import gc
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from steer.artefacts.library import labels_of
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel, search_labels
from steer.artefacts.sae.storage.file_arrays import FileArray, OpenedFile
from steer.artefacts.sae.storage.rows import FeatureRows
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.registry.registry import Registry
from steer.spec import parse_spec

LAYER = 1
BLOCK = 1 << 12
SHIFT = 1 << 9
"""Rows by which one SAE's begin behind those of the one before: no two files are alike."""
TOKENS = 8


def measure(*, count: int, latents: int, width: int, labelled: int) -> dict[str, Any]:
    """Resident MiB, and their peak, after each step."""
    with tempfile.TemporaryDirectory() as name, _small_model(width) as engine:
        folder = Path(name)
        rows = _random_rows(folder / "rows", latents + 2 * SHIFT * count, width)
        with Registry.open(folder / "registry") as registry:
            steps = Steps()
            bytes_each = 0
            for n in tqdm(range(count), desc="registered", unit="SAE"):
                sae = _sae(rows, n, latents, width, labelled)
                entry, _ = registry.add(_name(n), sae)
                bytes_each = entry.size_bytes
            del sae
            steps.take("registered")
            for n in range(count):
                registry.sae(_name(n))
            steps.take("loaded")
            found = sum(
                len(search_labels(labels_of(registry, _name(n)), "word 17", limit=20))
                for n in range(count)
            )
            steps.take("searched")
            plans = plans_of(engine, registry)
            each = [plans.plan(parse_spec(_clamp(n, latents))) for n in range(count)]
            steps.take("a clamp of two features planned for each")
            sampling = SamplingParams(max_tokens=TOKENS, temperature=0.0)
            requests = [
                GenerationRequest(f"request-{n}", (5, 6, 7, 8), sampling, plan)
                for n, plan in enumerate(each)
            ]
            done = engine.complete(requests)
            steps.take("run in one batch")
            steered = sum(one.receipt is not None for one in done)
    return {
        "count": count,
        "latents": latents,
        "width": width,
        "labels": labelled,
        "MiB of a file": bytes_each / (1 << 20),
        "found": found,
        "answers": len(done),
        "receipts": steered,
        "before": steps.before,
        "steps": steps.taken,
        **each_of(steps.before, steps.taken, count),
    }


def each_of(
    before: float, steps: Mapping[str, Mapping[str, float]], count: int
) -> dict[str, float]:
    """Of each of `count` SAEs, how much the resident memory and its peak are above `before`."""
    last = list(steps.values())[-1]
    return {
        "MiB of each": (last["resident"] - before) / count,
        "peak MiB of each": (max(one["peak"] for one in steps.values()) - before) / count,
    }


class Steps:
    """MiB of this process after each step, and the most while it was taken."""

    def __init__(self) -> None:
        self.before = _reset_peak()
        self.taken: dict[str, dict[str, float]] = {}

    def take(self, name: str) -> None:
        peak = _status("VmHWM")
        self.taken[name] = {"peak": peak, "resident": _reset_peak()}


def _reset_peak() -> float:
    """The resident MiB, without what was freed; the peak begins anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def _status(key: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(f"{key}:"))


def _name(n: int) -> str:
    return f"random-{n}"


def _clamp(n: int, latents: int) -> dict[str, Any]:
    item = {"kind": "clamp", "sae": _name(n), "features": [n, latents - 1 - n], "value": 4.0}
    return {"interventions": [item]}


def _random_rows(path: Path, count: int, width: int) -> FileArray:
    """`[count, width]` bfloat16 in a file that is written block by block."""
    generator = torch.Generator().manual_seed(0)
    with path.open("wb") as file:
        for start in range(0, count, BLOCK):
            rows = torch.randn(min(BLOCK, count - start), width, generator=generator)
            file.write((rows / width**0.5).bfloat16().view(torch.uint8).numpy().data)
    return FileArray.plain(OpenedFile.at(path), torch.bfloat16, 0, (count, width))


def _sae(rows: FileArray, n: int, latents: int, width: int, labelled: int) -> SAE:
    """A JumpReLU SAE of the rows from its own place on."""

    def part(at: int) -> FeatureRows:
        offset = 2 * width * SHIFT * at
        return FeatureRows(FileArray.plain(rows.source, torch.bfloat16, offset, (latents, width)))

    return SAE.of_rows(
        "jumprelu",
        encoder=part(2 * n),
        decoder=part(2 * n + 1),
        b_dec=torch.zeros(width),
        threshold=torch.full((latents,), 2.0),
        layer=LAYER,
        labels={one: FeatureLabel(text=f"the word {one}") for one in range(labelled)},
    )


@contextmanager
def _small_model(width: int) -> Iterator[Engine]:
    """Two blocks of this width, of random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM  # noqa: PLC0415

    from steer.engines.fake.tokenizer import ByteTokenizer  # noqa: PLC0415
    from steer.engines.transformers.engine import TransformersEngine  # noqa: PLC0415

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=ByteTokenizer.vocab_size,
        hidden_size=width,
        num_hidden_layers=LAYER + 1,
        intermediate_size=width,
        num_attention_heads=4,
        max_position_embeddings=64,
        eos_token_id=ByteTokenizer.eos_token_id,
    )
    model = LlamaForCausalLM(config)
    with TransformersEngine(model, ByteTokenizer(), name="small", rows=16, slots=32) as engine:
        yield engine


HEADINGS = ("after", "resident MiB", "more than before, of each", "peak MiB while at it")


def lines(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """The rows of the table."""
    before, count = found["before"], found["count"]
    return [
        ("before", f"{before:.0f}", "", ""),
        *(
            (
                name,
                f"{one['resident']:.0f}",
                f"{(one['resident'] - before) / count:.2f}",
                f"{one['peak']:.0f}",
            )
            for name, one in found["steps"].items()
        ),
    ]
