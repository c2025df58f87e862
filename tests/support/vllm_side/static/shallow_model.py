"""The demo model's first layers, and random specs of every kind for them: small enough for kernels
that are interpreted.

Import `vllm_engine` before this module.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import demo_specs
import torch
import vllm_engine
from artefacts import SCOPES, artefacts, random_detection, random_spec
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm_crowd import Habits
from vllm_engine import DEMO_MODEL, Plans
from vllm_simulation import steering

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import Engine
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.registry.registry import Registry
from steer.spec import parse_spec

LAYERS = 2
LATENTS = 64
"""Of its TopK SAE."""
BRIEF = Habits(
    longest_prompt=70,
    longest_start=20,
    longest_answer=8,
    vocabulary=64,  # that of the random specs' triggers
    reads=0.06,
    points=(HookPoint(0, "attn_out"), HookPoint(LAYERS - 1)),
)
"""A crowd that says little, and reads states."""

CLIENTS = int(os.environ.get("STEER_CROWD", "150"))
"""How many come to an engine whose kernel is interpreted: 500 take a slow core 15 minutes."""
WAVES = max(CLIENTS // 50, 1)
_ARTEFACTS = artefacts(demo_specs.WIDTH, LAYERS)
TOPK = {"kind": "clamp", "sae": "topk", "features": [1, 5, 9], "value": 1.0}


def write_shallow_model(folder: Path) -> Path:
    """Saves the model and its tokenizer to `folder`, and returns that."""
    model = AutoModelForCausalLM.from_pretrained(
        DEMO_MODEL, num_hidden_layers=LAYERS, dtype=torch.float32
    )
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO_MODEL).save_pretrained(folder)
    return folder


def fill_registry(folder: Path) -> None:
    """Puts the artefacts there that the specs name."""
    with Registry.open(folder) as registry:
        for found in _ARTEFACTS.values():
            for name, artefact in found.items():
                registry.add(name, artefact)


@contextmanager
def crowded_engine(
    registry: Path, model: Path, *, blocks: int, step_tokens: int, **options: Any
) -> Iterator[VllmEngine]:
    """The model in the form for CUDA graphs, with `blocks` of cache for 16 requests at a time; a
    step inside a graph has room to rank the latents of 8 tokens."""
    own = {"form": "static", "latents_at_once": LATENTS * 8}
    with vllm_engine.start_engine(
        registry,
        model=str(model),
        additional_config={"steer": own},
        num_gpu_blocks_override=blocks,
        max_num_batched_tokens=step_tokens,
        max_num_seqs=16,
        enable_prefix_caching=True,
        **options,
    ) as running:
        assert steering(running).edits.static
        yield running


def random_plans(engine: Engine, count: int, *, seed: int) -> Plans:
    """Of `count` specs every fourth is behind a gate, and every sixth clamps features of a TopK
    SAE; beside them one that steers nothing."""
    library, draw = MemoryLibrary(**_ARTEFACTS), random.Random(seed)
    cache = PlanCache(library, engine.info, engine.capabilities)
    plans: Plans = {"unsteered": None}
    for number in range(count):
        gated, competes = number % 4 == 3, number % 6 == 5
        plan = _random_plan(cache, draw, gated=gated, competes=competes)
        kinds = {item.kind for item in plan.spec.interventions}
        plans[" ".join([str(number), *(["gated"] if gated else []), *sorted(kinds)])] = plan
    return plans


def _random_plan(
    cache: PlanCache, draw: random.Random, *, gated: bool, competes: bool
) -> SteeringPlan:
    while True:
        raw = random_spec(draw, layers=LAYERS, longest=3)
        if competes:
            raw["interventions"].insert(0, TOPK)
        if gated:
            raw["when"] = _random_gate(draw)
        try:
            plan = cache.plan(parse_spec(raw))
        except SteerError:  # a gate that reads behind its edits, say
            continue
        if plan.competes == competes:
            return plan


def _random_gate(draw: random.Random) -> dict[str, Any]:
    """Over a state of the first layer, which about half of all tokens pass."""
    if draw.random() < 0.4:
        return random_detection(draw)
    return {
        "vector": draw.choice(["v0", "v1"]),
        draw.choice(["above", "below"]): draw.uniform(-0.2, 0.2),
        "scope": draw.choice(SCOPES),
        "layer": 0,
    }
