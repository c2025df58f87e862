"""What the experiments run on: a model, one of its SAEs, and the files that they write.

What the model has said and read is written down beside the figures, and is not asked again: a run
that was cut off goes on where it was.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from benchmarks.machine import ROOT, machine
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.cli.local import open_registry, running_engine
from steer.engines.base import Engine
from steer.engines.journal import JournaledEngine
from steer.registry.registry import Registry

FOLDER = ROOT / "build" / "saes"
LETTERS = 4
"""The least letters of a word that a clear label names; so many first ones make words alike."""


@dataclass(frozen=True)
class Options:
    """Which model, SAE and registry, in which `dtype`, and where files go."""

    model: str
    sae: str
    registry: str | None
    dtype: str
    threads: int
    seed: int
    folder: Path


@dataclass(frozen=True)
class Setting:
    """`engine` writes down what it was asked; `labels` are those of the SAE's features."""

    options: Options
    engine: Engine
    registry: Registry
    sae: SAE
    labels: Mapping[int, FeatureLabel]

    def write(self, name: str, found: Mapping[str, Any]) -> None:
        """The figures of one experiment, with what they were measured on."""
        options = self.options
        content = {
            "machine": machine(("torch", "transformers", "steer-llm")),
            "model": self.engine.info.name,
            "sae": {"name": options.sae, "sha256": self.sae.sha256, "features": self.sae.d_sae},
            "dtype": options.dtype,
            "seed": options.seed,
            **found,
        }
        write_figures(options.folder / f"{name}.json", content)


def write_figures(path: Path, content: Mapping[str, Any]) -> None:
    """The whole file, or none of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".new")
    text = json.dumps(content, indent=1, ensure_ascii=False, default=asdict)
    beside.write_text(text + "\n")
    beside.replace(path)
    print(f"figures: {path}", flush=True)


@contextmanager
def opened(options: Options, name: str) -> Iterator[Setting]:
    """The setting of the experiment `name`. Raises `SteerError`."""
    torch.set_num_threads(options.threads)
    options.folder.mkdir(parents=True, exist_ok=True)
    with (
        open_registry(options.registry, options.model) as registry,
        running_engine(options.model, dtype=options.dtype) as engine,
    ):
        noted = JournaledEngine(engine, options.folder / f"{name}-{options.dtype}.jsonl")
        labels = registry.labels(options.sae)
        yield Setting(options, noted, registry, registry.sae(options.sae), labels)


@contextmanager
def counting(what: str, total: int, unit: str) -> Iterator[tqdm[Any]]:
    """A bar that is written a line at a time where nobody watches."""
    with tqdm(total=total, desc=what, unit=unit, mininterval=5) as bar:
        yield bar


def clear_features(labels: Mapping[int, FeatureLabel], count: int, seed: int) -> list[int]:
    """`count` features whose label says one thing, drawn with `seed`: it names one word, or several
    that begin alike. Raises `ValueError` where there are fewer."""
    clear = sorted(feature for feature, label in labels.items() if is_clear(label.tokens))
    if len(clear) < count:
        raise ValueError(
            f"{len(clear)} features have a label that names one word, and {count} are asked for: "
            "name features with --feature, or make labels with `steer sae labels make`"
        )
    return random.Random(seed).sample(clear, count)


def is_clear(tokens: Sequence[str]) -> bool:
    """Whether these tokens are one word, or words that begin with the same letters."""
    words = [one.strip().lower() for one in tokens]
    return bool(words) and (
        all(len(one) >= LETTERS and one.isalpha() for one in words)
        and len({one[:LETTERS] for one in words}) == 1
    )
