"""Runs of one prompt whose subject is disturbed, each with one state put back, as plans.

The noise is added where the stream enters the first block; what is put back is patched after that,
so one spec holds both, and any engine that adds and patches can trace.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Engine
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import Add, Patch, Site, SteeringSpec, Where

EMBEDDING = HookPoint(0, "resid_pre")

_AT_ONCE = 64


@dataclass(frozen=True)
class Restored:
    """States put back at the absolute `position`: at `site`, those of `rows`, by layer."""

    position: int
    site: Site
    rows: dict[int, Float[Tensor, " d_model"]] = field(hash=False)


@dataclass(frozen=True)
class Disturbed:
    """A run: `noise` `[tokens, d_model]` added to the embeddings at `positions`, and what is put
    back."""

    positions: tuple[int, ...]
    noise: Float[Tensor, "tokens d_model"]
    restored: Restored | None = None


def noise_of(seed: int, count: int, width: int) -> Float[Tensor, "count width"]:
    """Standard normal numbers, the same for a seed on every machine and for every engine."""
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed))


def disturbed_plan(run: Disturbed, plans: PlanCache) -> SteeringPlan:
    """The plan of `run`."""
    vectors, items = {}, []
    for place, row in zip(run.positions, run.noise, strict=True):
        name = f"noise-{place}"
        vectors[name] = ControlVector.of({EMBEDDING.layer: row}, name=name, site=EMBEDDING.site)
        items.append(
            Add(
                vector=name,
                strength=1.0,
                layers=(EMBEDDING.layer,),
                site=EMBEDDING.site,
                where=_only(place),
            )
        )
    back = run.restored
    if back is None:
        return plans.plan(SteeringSpec(interventions=tuple(items)), vectors=vectors)
    vectors["clean"] = ControlVector.of(back.rows, name="clean", site=back.site)
    patch = Patch(
        vector="clean", layers=tuple(back.rows), site=back.site, where=_only(back.position)
    )
    return plans.plan(SteeringSpec(interventions=(*items, patch)), vectors=vectors)


def chances(
    engine: Engine, prompt: tuple[int, ...], runs: Sequence[Disturbed], token: int
) -> list[float]:
    """The probability of `token` after `prompt` in each run, a bounded number of them a batch."""
    cache = PlanCache(MemoryLibrary(), engine.info, engine.capabilities, size=1)
    at_once = min(_AT_ONCE, engine.capabilities.limits.get("slots", _AT_ONCE))
    found: list[float] = []
    for start in range(0, len(runs), at_once):
        plans = [disturbed_plan(run, cache) for run in runs[start : start + at_once]]
        captured = engine.capture(
            CaptureRequest(prompts=[prompt] * len(plans), plans=plans, logits="last")
        )
        logits = torch.stack([one.logits[-1] for one in captured if one.logits is not None])
        found += logits.double().softmax(-1)[:, token].tolist()
    return found


def _only(position: int) -> Where:
    return Where(phases=("prompt",), positions=((position, position + 1),))
