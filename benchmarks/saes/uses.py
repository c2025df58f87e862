"""Ways to use an SAE for an attribute, each as a spec that one number makes stronger."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from benchmarks.saes.setting import Setting
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.fit.data.where import WHERES, WhereName
from steer.fit.features.effect import NEAR
from steer.fit.make.trials import Use
from steer.plan.plan import SteeringPlan
from steer.prompts import Marked
from steer.spec import parse_spec

Item: TypeAlias = dict[str, Any]

_PER_ROOT_KL = 0.47


@dataclass(frozen=True)
class Way:
    """An intervention by its strength; `length` is that of what strength 1 writes."""

    item: Callable[[float], Item]
    length: float


@dataclass(frozen=True)
class SAEPlans:
    """The ways by name, which are the sources of uses; `mean_norm` is that of the states."""

    engine: Engine
    sae: SAE
    ways: Mapping[str, Way]
    mean_norm: float

    def use(self, name: str, where: WhereName = "all") -> Use:
        return Use(name, (self.sae.write_point.layer,), where)

    def plan(self, use: Use, strength: float) -> SteeringPlan:
        item = self.ways[use.source].item(strength)
        where = WHERES[use.where]
        if where is not None:
            item = {**item, "where": where}
        plans = plans_of(self.engine, MemoryLibrary(saes={"sae": self.sae}))
        return plans.plan(parse_spec({"interventions": [item]}))

    def likely_strength(self, use: Use, kl: float) -> float:
        return _PER_ROOT_KL * math.sqrt(kl) * self.mean_norm / self.ways[use.source].length


def clamp(
    sae: SAE, features: Sequence[int], mode: str, shares: Sequence[float] | None = None
) -> Way:
    """Features clamped together: each to, or by, the strength times its share (1)."""
    each = [1.0] * len(features) if shares is None else list(shares)
    rows = sae.writes(features) * sae.write_scale
    length = float((torch.tensor(each, dtype=rows.dtype) @ rows).norm())

    def item(strength: float) -> Item:
        value = [strength * one for one in each]
        return {
            "kind": "clamp",
            "sae": "sae",
            "features": list(features),
            "mode": mode,
            "value": value,
        }

    return Way(item, length)


def concept(setting: Setting, text: str, contrast: str | None = None) -> Way:
    """What a text means to the SAE (2501.19066), less what another does."""
    words = {"text": text} if contrast is None else {"text": text, "contrast": contrast}

    def item(strength: float) -> Item:
        return {"kind": "concept", "sae": "sae", "strength": strength, **words}

    return Way(item, _written(setting, item(1.0)))


def _written(setting: Setting, item: Item) -> float:
    """The length of what an intervention of constants adds."""
    plans = plans_of(setting.engine, MemoryLibrary(saes={"sae": setting.sae}))
    [rule] = plans.plan(parse_spec({"interventions": [item]})).rules
    [block] = rule.blocks.values()
    if block.shift is None:
        raise ValueError(f"a {item['kind']} adds no constant on this SAE")
    return float(block.shift.norm())


def differences(told: Sequence[Sequence[float]], opposed: Sequence[Sequence[float]]) -> list[float]:
    """Of mean activations `[texts, features]` of both sides the difference, the largest being 1.
    Features that the told side does not raise have none of it."""
    apart = torch.tensor(told).mean(0) - torch.tensor(opposed).mean(0)
    kept = apart.clamp(min=0)
    if not bool(kept.any()):
        raise ValueError("none of the features is more active on the told side")
    found: list[float] = (kept / kept.max()).tolist()
    return found


def answered(prompts: Sequence[Any], texts: Sequence[str]) -> list[Marked]:
    """Plain questions with the answers that were given to them in words."""
    return [
        Marked(prompt, response=text)
        for prompt, text in zip(prompts, texts, strict=True)
        if text.strip()
    ]


def like(
    features: Sequence[int], rates: Tensor, rows: Tensor, count: int, seed: int
) -> list[list[int]]:
    """`count` sets of other features, each like one of `features` in how often it fires.

    Of each, one is drawn among the `4 · count` nearest in rate whose decoder `rows` point nowhere
    near any of `features`; no feature is in two sets. Raises `ValueError` where there are too few.
    """
    units = torch.nn.functional.normalize(rows.double(), dim=-1)
    near = (units @ units[list(features)].T).abs().amax(1) >= NEAR
    free = ~near & (rows.norm(dim=-1) > 0)
    free[list(features)] = False
    generator = torch.Generator().manual_seed(seed)
    found: list[list[int]] = [[] for _ in range(count)]
    for feature in features:
        left = torch.nonzero(free).flatten()
        if len(left) < count:
            raise ValueError(f"too few features are left to draw {count} like feature {feature}")
        order = (rates[left] - rates[feature]).abs().argsort(stable=True)
        nearest = left[order[: 4 * count]]
        drawn = nearest[torch.randperm(len(nearest), generator=generator)[:count]].tolist()
        for one, mine in zip(drawn, found, strict=True):
            mine.append(one)
            free[one] = False
    return found
