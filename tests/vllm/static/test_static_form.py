"""The form for CUDA graphs, in a real engine: its kernel under Triton's interpreter, on a CPU.

The whole contract, clamps of a TopK SAE in it. A CPU replays no graphs, so what must run without
one is counted where vLLM chooses.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from pathlib import Path

import demo_specs
import pytest
import vllm_engine
from vllm_contract import *  # noqa: F403
from vllm_engine import Plans
from vllm_simulation import graphless_steps, steering

from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.vllm.front.engine import VllmEngine
from steer.model import HookPoint
from steer.spec import Site

TOPK, LATENTS, RANKED = "a clamp that competes", 64, 32
"""The latents of its SAE, and for how many tokens a step in a graph has room."""


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    # One site inside is enough to show the kernel there: the interpreter is slow.
    own = {"form": "static", "sites": ["mlp_act"], "latents_at_once": LATENTS * RANKED}
    with vllm_engine.start_engine(registry, additional_config={"steer": own}) as running:
        assert steering(running).edits.static
        yield running


@pytest.fixture(scope="module")
def closed() -> frozenset[Site]:
    return frozenset({"attn_in", "head_out", "mlp_in"})


@pytest.fixture(scope="module")
def rounds() -> int:
    """One: the interpreter is slow, and there are three batches."""
    return 1


@pytest.fixture(scope="module")
def alone_each() -> int:
    """A request alone takes the interpreter as long as a batch; three batches, in other orders,
    are each held against the reference."""
    return 4


@pytest.fixture
def forced(engine: VllmEngine) -> Iterator[list[bool]]:
    """For each step, whether vLLM let it have no graph."""
    with graphless_steps(engine) as steps:
        yield steps


def sites(engine: VllmEngine) -> tuple[HookPoint, ...]:
    return tuple(HookPoint(3, site) for site in engine.info.sites)


def test_only_what_no_kernel_does_leaves_its_graph(
    engine: VllmEngine, plans: Plans, forced: list[bool]
) -> None:
    """States that are read, more latents than there is room for, and several tokens of a request
    with an onward gate; and gates that pool."""
    others = {
        name: one for name, one in plans.items() if one is None or not (one.onward or one.pooled)
    }
    assert len(others) == len(plans) - 5
    engine.complete(demo_specs.requests_for(others, len(others), seed=3, longest=8))
    assert forced
    assert not any(forced)
    forced.clear()
    sampling = SamplingParams(max_tokens=4, temperature=0, ignore_eos=True)
    onward = plans["an onward gate"]
    engine.complete([GenerationRequest("onward", (5, 9, 200), sampling, onward)])
    assert forced == [True, False, False, False]
    forced.clear()
    pooled = plans["a gate on the last of a prompt"]
    engine.complete([GenerationRequest("pooled", (5, 9, 200), sampling, pooled)])
    assert forced == [True] * 4
    forced.clear()
    engine.capture(
        CaptureRequest([tuple(range(40, 75))], sites(engine), plans=[plans["everything"]])
    )
    assert forced
    assert all(forced)
    forced.clear()
    prompt = tuple(range(1000, 1000 + RANKED + 1))  # that nobody has sent, so that all is computed
    engine.complete([GenerationRequest("long", prompt, sampling, plans[TOPK])])
    assert forced == [True, False, False, False]
    assert steering(engine).stats().slots_in_use == 0
    forced.clear()
    engine.complete(demo_specs.requests_for({"unsteered": None}, 1))
    assert not any(forced)


def test_everything_is_offered(engine: VllmEngine) -> None:
    assert "topk" in engine.capabilities.sae_architectures
    assert engine.capabilities.captures == engine.info.sites
