"""What an instruction does to the model's states, and the directions that are read from it.

The same question is answered once with the instruction and once with its opposite in the same
place, so that what differs is what was asked for, and not that something was. Two readings of it:
`response`, the mean over the answer's tokens; and `last`, the prompt's last token, which opens the
answer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.engines.journal import remembered
from steer.fit.measure.answers import Answer, Progress
from steer.fit.methods.method import MakeMethod
from steer.model import HookPoint
from steer.spec import Site

Source: TypeAlias = str
"""Which reading of the states a vector was fitted on."""

SOURCES: tuple[Source, ...] = ("response", "last")

PairStates: TypeAlias = Mapping[int, tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]]
"""By layer, the states of both sides, in pairs: with the instruction, and without."""

_BATCH = 16


@dataclass(frozen=True)
class AnswerPair:
    """One question: the answers of the model that is told the instruction, and of the one that is
    told its opposite (or nothing of the kind). Their prompts are in the answers."""

    told: Answer
    opposed: Answer


def contrast_states(
    engine: Engine,
    exchanges: Sequence[AnswerPair],
    *,
    site: Site,
    layers: Sequence[int],
    progress: Progress | None = None,
) -> dict[Source, dict[int, tuple[Tensor, Tensor]]]:
    """The states of every source, one of each side for an exchange; exchanges whose answers have no
    tokens are left out. `progress` is told of every exchange that was read."""
    points = tuple(HookPoint(layer, site) for layer in layers)
    kept = [one for one in exchanges if one.told.tokens and one.opposed.tokens]
    read = [torch.empty(2, 0, len(SOURCES), len(points), engine.info.width(site))]
    for first in range(0, len(kept), _BATCH):
        group = kept[first : first + _BATCH]
        sides = [one.told for one in group], [one.opposed for one in group]
        texts = [[(one.prompt, one.tokens) for one in side] for side in sides]
        read_both = partial(_read_both, engine, sides, points)
        read.append(remembered(engine, ["contrast", points, texts], read_both))
        if progress is not None:
            progress(len(group))
    told, opposed = torch.cat(read, 1)
    return {
        source: {layer: (told[:, s, n], opposed[:, s, n]) for n, layer in enumerate(layers)}
        for s, source in enumerate(SOURCES)
    }


def directions(states: PairStates, make: MakeMethod) -> dict[int, Tensor]:
    """The direction by layer that `make` fits on the states."""
    found = {}
    for layer, (positive, negative) in states.items():
        method = make(positive.shape[1])
        method.add(positive, negative)
        found[layer] = method.direction()
    return found


def _read_both(
    engine: Engine, sides: Sequence[Sequence[Answer]], points: tuple[HookPoint, ...]
) -> Float[Tensor, "2 n sources layers d"]:
    return torch.stack([_read(engine, side, points) for side in sides])


def _read(
    engine: Engine, answers: Sequence[Answer], points: tuple[HookPoint, ...]
) -> Float[Tensor, "n sources layers d"]:
    """The states of every source, in their order: the mean over the answer, and the state at the
    prompt's last token."""
    captured = engine.capture(CaptureRequest([one.prompt + one.tokens for one in answers], points))
    rows = []
    for answer, one in zip(answers, captured, strict=True):
        states = torch.stack([one.states[point] for point in points])  # [layers, tokens, d]
        start = len(answer.prompt)
        rows.append(torch.stack([states[:, start:].mean(1), states[:, start - 1]]))
    return torch.stack(rows)
