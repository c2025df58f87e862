"""Hits and surprisals of readings, by layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.fit.measure.bootstrap import Interval, Resamples
from steer.inspection.controls import of_length
from steer.inspection.patchscopes.patched_runs import (
    PatchedAnswer,
    StatePatch,
    TargetRun,
    run_targets,
)
from steer.model import HookPoint

Tokens = tuple[int, ...]
AT_ONCE = 256
LEAST_CHANCE = 1e-12
"""What a chance counts as at least: a surprisal of 27.6 nats."""


class Share(BaseModel):
    """A mean over contexts, with the central 95 % of it over resampled contexts."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value: float
    low: float
    high: float

    @staticmethod
    def of(interval: Interval) -> Share:
        return Share(value=interval.value, low=interval.low, high=interval.high)

    def __str__(self) -> str:
        return f"{self.value:.3f} [{self.low:.3f}, {self.high:.3f}]"


class Curve(BaseModel):
    """precision@1 and surprisal (nats) of the wanted token, for each of `layers`; a reading that no
    layer changes has one value for all."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    layers: tuple[int, ...]
    precision: tuple[Share, ...]
    surprisal: tuple[Share, ...]


@dataclass
class Reader:
    """Gathers what was read, of `wanted` tokens, one for each context."""

    wanted: Sequence[int]
    curves: list[Curve] = field(default_factory=list)
    hits: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._resamples = Resamples.draw(len(self.wanted))

    def add(self, name: str, layers: Sequence[int], hits: Tensor, chances: Tensor) -> None:
        """`hits` and `chances` `[layers, contexts]`."""
        self.hits[name] = hits
        surprisal = -chances.clamp_min(LEAST_CHANCE).log()
        self.curves.append(
            Curve(
                name=name,
                layers=tuple(layers),
                precision=self._shares(hits.double()),
                surprisal=self._shares(surprisal.double()),
            )
        )

    def difference(self, name: str, other: str, layer: int) -> Share:
        """precision@1 of one reading less that of another, paired, at a row of both."""
        one, two = (self.hits[n] for n in (name, other))
        rows = (one[layer].tolist(), two[min(layer, len(two) - 1)].tolist())
        return Share.of(self._resamples.difference(*rows))

    def add_answers(self, name: str, layers: Sequence[int], said: Sequence[PatchedAnswer]) -> None:
        """Answers of layers within contexts."""
        hits, chances = [], []
        for one in said:
            assert one.expected is not None
            hits.append(one.top[0].id == one.expected.id)
            chances.append(one.expected.probability)
        shape = (len(self.wanted), len(layers))
        self.add(
            name,
            layers,
            torch.tensor(hits).reshape(shape).T,
            torch.tensor(chances, dtype=torch.float64).reshape(shape).T,
        )

    def _shares(self, values: Tensor) -> tuple[Share, ...]:
        return tuple(Share.of(self._resamples.mean(row.tolist())) for row in values)


def last_states(
    engine: Engine, prompts: Sequence[Tokens], layers: Sequence[int]
) -> tuple[Tensor, list[int]]:
    """States of the last tokens at the end of each of `layers`, `[prompts, layers, d_model]`, and
    the token that the model itself says next."""
    points = tuple(HookPoint(layer) for layer in layers)
    states, said = [], []
    for first in range(0, len(prompts), AT_ONCE):
        group = prompts[first : first + AT_ONCE]
        for one in engine.capture(CaptureRequest(group, points, (-1,), logits="last")):
            assert one.logits is not None
            states.append(torch.stack([one.states[point][0] for point in points]))
            said.append(int(one.logits[-1].argmax()))
    return torch.stack(states), said


def shifted(states: Tensor) -> Tensor:
    """Each context's states replaced by the next one's, of the length of its own."""
    return torch.stack(
        [
            torch.stack([of_length(o, s) for o, s in zip(other, own, strict=True)])
            for other, own in zip(states.roll(-1, 0), states, strict=True)
        ]
    )


def patched(
    engine: Engine,
    target: Tokens,
    place: int,
    states: Tensor,
    wanted: Sequence[int],
    goals: Mapping[int, int],
) -> list[PatchedAnswer]:
    """What the target prompt says with each of `states` `[contexts, layers, d_model]` put in;
    `goals` are the layers that were read, each with the one to put its state at. Layers within
    contexts."""
    runs = []
    for row, token in zip(states, wanted, strict=True):
        for (layer, goal), state in zip(goals.items(), row, strict=True):
            patch = StatePatch(0, HookPoint(layer), HookPoint(goal), state, token)
            runs.append(TargetRun(target, place, patch, token))
    return run_targets(engine, runs, top=1, max_tokens=0)


def said_of(
    engine: Engine, prompts: Sequence[Tokens], wanted: Sequence[int]
) -> list[PatchedAnswer]:
    """What plain prompts say, of the wanted tokens."""
    order = sorted(range(len(prompts)), key=lambda n: len(prompts[n]))
    runs = [TargetRun(prompts[n], expected=wanted[n]) for n in order]
    said = dict(zip(order, run_targets(engine, runs, top=1, max_tokens=0), strict=True))
    return [said[n] for n in range(len(prompts))]
