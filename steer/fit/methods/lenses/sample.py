"""States of every layer at some tokens of some texts."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.fit.states import Progress
from steer.model import HookPoint

Tokens = tuple[int, ...]


def layer_points(engine: Engine) -> tuple[HookPoint, ...]:
    """What goes into each decoder block, and last what the last block gives."""
    outputs = (HookPoint(layer, "resid_post") for layer in range(engine.info.n_layers))
    return (HookPoint(0, "resid_pre"), *outputs)


def read_layers(
    engine: Engine, texts: Sequence[Tokens], batch: int, progress: Progress | None
) -> Iterator[Float[Tensor, "points tokens d_model"]]:
    """The states of each text, in order, at `layer_points`."""
    points = layer_points(engine)
    for first in range(0, len(texts), batch):
        group = texts[first : first + batch]
        for one in engine.capture(CaptureRequest(group, points)):
            yield torch.stack([one.states[point] for point in points])
        if progress is not None:
            progress(len(group))


def draw_places(texts: Sequence[Tokens], count: int, seed: int) -> list[list[int]]:
    """For each text, the positions of its tokens among `count` drawn from all texts' tokens."""
    every = [(n, place) for n, text in enumerate(texts) for place in range(len(text))]
    kept: list[list[int]] = [[] for _ in texts]
    for n, place in random.Random(seed).sample(every, min(count, len(every))):
        kept[n].append(place)
    return kept
