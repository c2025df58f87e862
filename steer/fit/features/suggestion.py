"""What `steer sae suggest` answers: features to clamp for what a sentence asks for."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, ConfigDict

from steer.artefacts.sae.labels import FeatureLabel


class SuggestedFeature(BaseModel):
    """A feature that may do what was asked for, and the spec that raises it so far.

    `auroc` and `held_out` are how well it tells answers under the instruction from others, on the
    half that found it and on the other. `gain` is how much likelier, in nats a token, raising it
    makes the answers to the model that is told the instruction than to the one that is told the
    opposite, less that of unsteered answers; a direction of chance at the same KL does `null` on
    average, `p` is the chance of one that does as much, and `q` the false discovery rate of p over
    the features that were raised. `causes`: p ≤ 0.05.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: int
    label: FeatureLabel | None
    auroc: float
    held_out: float
    confirmed: bool
    gain: float
    null: float | None
    p: float | None
    q: float | None
    causes: bool
    strength: float
    kl: float
    reached: bool
    example: str
    spec: dict[str, Any]


class Suggestions(BaseModel):
    """Features by what they do, the one with the greatest gain first.

    `told` is the gain of the model's answers when it is told the instruction in words, in place
    `place`; `tested` features fire on its answers.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: str
    opposite: str
    place: str
    questions: int
    tested: int
    told: float
    features: tuple[SuggestedFeature, ...]
