"""A use of a vector, and what it did to answers when it was tried."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

import numpy as np
from scipy.optimize import isotonic_regression

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.fit.data.where import WHERES, WhereName
from steer.fit.make.contrast import Source
from steer.fit.measure.answers import Measured
from steer.fit.measure.nulls.matching import Match
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec


@dataclass(frozen=True)
class Use:
    """A way to use what was read: which reading, on which layers, on which tokens."""

    source: Source
    layers: tuple[int, ...]
    where: WhereName


class PlansOfUses(Protocol):
    """What is tried: the plan of each use at each strength, and about how strong a KL is."""

    def plan(self, use: Use, strength: float) -> SteeringPlan: ...

    def likely_strength(self, use: Use, kl: float) -> float:
        """Where the search for the strength of this KL, in nats, starts."""


@dataclass(frozen=True)
class VectorPlans:
    """Vectors that are added, each of a reading of the states."""

    engine: Engine
    vectors: Mapping[Source, ControlVector]

    def plan(self, use: Use, strength: float) -> SteeringPlan:
        return plan_of(self.engine, self.vectors[use.source], use, strength)

    def likely_strength(self, use: Use, kl: float) -> float:
        return likely_strength(self.vectors[use.source], use.layers, kl)


@dataclass(frozen=True)
class Trial:
    """A use at the strength whose KL in nats came nearest to `budget`, and what it did. `valid` and
    `score` are the means over the answers; `both` counts those that are not sound as 0."""

    use: Use
    budget: float
    strength: float
    kl: float
    score: float
    valid: float
    both: float
    example: str

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def trial_of(use: Use, budget: float, match: Match | Trial, figures: Measured) -> Trial:
    """The trial of `use` at the strength that was matched, by what its answers came to."""
    valid = 1.0 if figures.valid is None else figures.valid
    return Trial(
        use=use,
        budget=budget,
        strength=match.strength,
        kl=match.kl,
        score=figures.score,
        valid=valid,
        both=figures.score if figures.both is None else figures.both,
        example=figures.examples[0],
    )


def pooled(one: Trial, again: Trial, share: float) -> Trial:
    """A trial with what it did in two runs; `share` of all questions are those of the second."""
    names = ("score", "valid", "both")
    before, after = (np.array([getattr(run, name) for name in names]) for run in (one, again))
    both = (1 - share) * before + share * after
    return replace(one, **dict(zip(names, both.tolist(), strict=True)))


def sound_trials(trials: Sequence[Trial], share: float) -> list[Trial]:
    """The trials in which that share of the answers is sound, their neighbours heard.

    Steering harder breaks no fewer answers: a share that rises with the KL is noise. So those of
    one use are smoothed to what falls with it (isotonic regression).
    """
    found = []
    for use in dict.fromkeys(one.use for one in trials):
        own = sorted((one for one in trials if one.use == use), key=lambda one: one.kl)
        smooth = isotonic_regression([one.valid for one in own], increasing=False).x
        found += [one for one, valid in zip(own, smooth, strict=True) if valid >= share - 1e-9]
    return found


def with_use(vector: ControlVector, best: Trial, **provenance: Any) -> ControlVector:
    """The vector with the use of a trial as its default, and `provenance` added to its card's."""
    changes = {
        "default_layers": best.use.layers,
        "default_where": WHERES[best.use.where],
        "default_strength": float(f"{best.strength:.4g}"),
        "provenance": {**vector.card.provenance, **provenance, "chosen_by": "effect"},
    }
    return replace(vector, card=vector.card.model_copy(update=changes))


def plan_of(engine: Engine, vector: ControlVector, use: Use, strength: float) -> SteeringPlan:
    """`vector` added at `strength`, as `use` says."""
    where = WHERES[use.where]
    item: dict[str, Any] = {
        "kind": "add",
        "vector": "made",
        "layers": list(use.layers),
        "strength": strength,
    }
    if where is not None:
        item["where"] = where
    return plans_of(engine, MemoryLibrary({"made": vector})).plan(
        parse_spec({"interventions": [item]})
    )


def likely_strength(vector: ControlVector, layers: Sequence[int], kl: float) -> float:
    """About the strength at which the vector, on `layers`, moves the model by `kl` nats: the search
    starts there.

    Half a root of the KL, as shares of the states' norms summed over the layers: found on one small
    model (at .4 nats, .28 to .34 for every source and run of layers), and only a beginning.
    """
    shares = [
        float(vector[layer].norm()) / norm
        for layer in layers
        if (norm := vector.card.measures[layer].residual_norm)
    ]
    return 0.47 * math.sqrt(kl) / sum(shares) if sum(shares) > 0 else 1.0
