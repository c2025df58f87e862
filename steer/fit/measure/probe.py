"""A registered vector as a scorer: does the model itself read the attribute in the answer?

The answer is read after its prompt, unsteered, and the state of its tokens is averaged at the
vector's hook point. Steering cannot fool it directly: what was edited is not what is read.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SteerError
from steer.fit.measure.scoring import Score
from steer.model import HookPoint

_BATCH = 64


@dataclass(frozen=True)
class ProbeScorer:
    """Scores by the projection of the answer's mean state on the unit direction at `layer`.

    With a `threshold`, 1 above it and 0 below. Without, the probability of the positive class, for
    two normal classes of the same spread: σ((x − midpoint) · d′² / gap), from the class means and
    the separation d′ on the vector's card. An answer without tokens is not judged.
    """

    vector: ControlVector
    layer: int
    threshold: float | None = None

    @staticmethod
    def of(
        vector: ControlVector, *, layer: int | None = None, threshold: float | None = None
    ) -> ProbeScorer:
        """A probe at `layer` (the card's first default layer). Raises `SteerError`
        (`not_measured`) where the card has no measures there and no threshold is given."""
        chosen = vector.card.used_layers[0] if layer is None else layer
        _ = vector[chosen]
        measure = vector.card.measures.get(chosen)
        known = measure is not None and None not in (
            measure.positive,
            measure.negative,
            measure.separation,
        )
        if threshold is None and not known:
            raise SteerError(
                f"the card of {vector.card.name!r} has no class means for layer {chosen}: give a "
                "threshold, or fit the vector with `steer fit`",
                code="not_measured",
            )
        return ProbeScorer(vector, chosen, threshold)

    def score(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        texts: Sequence[str],
    ) -> list[Score]:
        del texts
        point = HookPoint(self.layer, self.vector.card.site)
        direction = self.vector[self.layer].double()
        direction = direction / direction.norm()
        found: list[Score] = []
        for first in range(0, len(prompts), _BATCH):
            rows = list(
                zip(prompts[first : first + _BATCH], answers[first : first + _BATCH], strict=True)
            )
            whole = [[*prompt, *answer] for prompt, answer in rows]
            captured = engine.capture(CaptureRequest(whole, (point,)))
            for (prompt, answer), one in zip(rows, captured, strict=True):
                states = one.states[point][len(prompt) :]
                value = float(states.double().mean(0) @ direction) if len(answer) else math.nan
                found.append(self._score(value))
        return found

    def _score(self, value: float) -> Score:
        if math.isnan(value):
            return Score(0.0, judged=False)
        if self.threshold is not None:
            return Score(float(value > self.threshold))
        return Score(self._probability(value))

    def _probability(self, value: float) -> float:
        measure = self.vector.card.measures[self.layer]
        positive, negative = measure.positive or 0.0, measure.negative or 0.0
        gap = positive - negative
        if gap == 0:
            return 0.5
        slope = (measure.separation or 0.0) ** 2 / gap
        logit = (value - (positive + negative) / 2) * slope
        return float(torch.tensor(logit, dtype=torch.float64).sigmoid())
