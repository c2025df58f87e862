"""What a model says at some tokens of held-out texts, and how far a reading is from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Engine
from steer.fit.methods.lenses.sample import Tokens, draw_places, layer_points, read_layers
from steer.fit.states import Progress
from steer.readouts.measures import kl_divergence

_LOGITS_AT_ONCE = 1 << 22
"""Logits compared at a time: 32 MiB of float64, whatever the vocabulary."""


@dataclass(frozen=True)
class Yardstick:
    """States `[points, n, d_model]` at `layer_points` of n tokens, and the model's own `logits`
    `[n, vocab]` there. Memory: n · (points · d_model + vocab) floats."""

    engine: Engine
    states: Float[Tensor, "points n d_model"]
    logits: Float[Tensor, "n vocab"]

    @staticmethod
    def read(
        engine: Engine,
        texts: Sequence[Tokens],
        count: int,
        seed: int,
        batch: int,
        progress: Progress | None,
    ) -> Yardstick:
        """At `count` tokens drawn from `texts`."""
        places = draw_places(texts, count, seed)
        found = [torch.zeros(len(layer_points(engine)), 0, engine.info.d_model)]
        for states, chosen in zip(read_layers(engine, texts, batch, progress), places, strict=True):
            found.append(states[:, chosen])
        states = torch.cat(found, dim=1)
        logits = [engine.unembed(part).cpu() for part in torch.split(states[-1], _rows(engine))]
        return Yardstick(engine, states, torch.cat(logits))

    def divergence(self, read: Float[Tensor, "n d_model"]) -> float:
        """The mean KL in nats, over the tokens, of the model's own distribution from that of the
        states `read`, taken as its last."""
        rows = _rows(self.engine)
        total = 0.0
        for own, states in zip(
            torch.split(self.logits, rows), torch.split(read, rows), strict=True
        ):
            total += float(kl_divergence(own, self.engine.unembed(states).cpu()).sum())
        return total / len(read)


def _rows(engine: Engine) -> int:
    return max(1, _LOGITS_AT_ONCE // engine.info.vocab_size)
