"""The form for CUDA graphs, in a real engine: its kernel under Triton's interpreter, on a CPU."""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator

import demo_specs
import inner_specs
import pytest
import vllm_engine
from vllm_contract import Plans, assert_same

from steer.engines.base import CaptureRequest
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry

TOPK = "a clamp that competes"


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VllmEngine]:
    folder = tmp_path_factory.mktemp("registry")
    with Registry.open(folder) as registry:
        demo_specs.register(registry)
        inner_specs.register(registry)
    options = {"steer": {"form": "static", "sites": "all"}}
    with vllm_engine.start_engine(folder, additional_config=options) as running:
        yield running


@pytest.fixture(scope="module")
def plans(engine: VllmEngine) -> Plans:
    cache = PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities)
    inside = inner_specs.compiled(engine.info, engine.capabilities)
    return demo_specs.compiled(cache) | {
        name: plan for name, plan in inside.items() if TOPK not in name
    }


def test_mixed_requests_equal_the_transformers_engine(engine: VllmEngine, plans: Plans) -> None:
    known = {name: plan for name, plan in plans.items() if name != TOPK}
    requests = demo_specs.requests_for(known, len(known), seed=3, longest=24)
    with TransformersEngine.load(vllm_engine.DEMO_MODEL, name="steer-demo") as reference:
        expected = reference.complete(requests)
    for request, mine, other in zip(requests, engine.complete(requests), expected, strict=True):
        assert_same(mine, other, request.id)
    stats = engine.stats()
    assert (stats.slots_in_use, stats.requests_running) == (0, 0)


def test_what_graphs_cannot_do_is_refused_by_name(engine: VllmEngine, plans: Plans) -> None:
    assert "topk" not in engine.capabilities.sae_architectures
    request = demo_specs.requests_for({TOPK: plans[TOPK]}, 1)
    with pytest.raises(SteerError, match="TopK SAE"):
        engine.complete(request)
    with pytest.raises(SteerError, match="CUDA graphs"):
        engine.capture(CaptureRequest([(1, 2, 3)], (HookPoint(1),)))
