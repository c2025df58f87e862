"""The part of a plan that one stage of a pipeline runs."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from artefacts import EVERYTHING, random_transcoder, shape_of

from steer.artefacts.library import MemoryLibrary
from steer.engines.vllm.pipeline import own_part
from steer.engines.vllm.taps.taps import layer_of, tap_of
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import Site, parse_spec


@dataclass(frozen=True)
class Stage:
    layers: range

    def owns(self, point: HookPoint) -> bool:
        return layer_of(tap_of(point)) in self.layers

    def ends_before(self, point: HookPoint) -> bool:
        return layer_of(tap_of(point)) >= self.layers.stop


def plan_of(site: Site) -> SteeringPlan:
    """A clamp of a transcoder of layer 1 that reads `site`."""
    sae = random_transcoder("standard", site=site)
    item = {"kind": "clamp", "sae": "t", "features": [3], "value": 1.0}
    plans = PlanCache(MemoryLibrary(saes={"t": sae}), shape_of(), EVERYTHING)
    return plans.plan(parse_spec({"interventions": [item]}))


@pytest.mark.parametrize("split", [1, 2])
def test_what_reads_and_writes_on_one_stage_is_its_own(split: int) -> None:
    parts = [own_part(plan_of("mlp_in"), Stage(one)) for one in (range(split), range(split, 4))]
    assert [len(part.rules[0].blocks) for part in parts] == [split == 2, split == 1]


def test_what_another_stage_computes_is_not_read() -> None:
    """The stream that a layer begins with is tapped at the end of the one before."""
    plan = plan_of("resid_pre")
    assert own_part(plan, Stage(range(4))).rules[0].blocks
    with pytest.raises(Unsupported, match=r"reads 1\.resid_pre, which another stage"):
        own_part(plan, Stage(range(1, 4)))
