"""vLLM engines for tests: in this process, on the demo model, with the plugin.

Import this module before vllm: it sets the environment that vLLM reads when it is imported.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liveness import VLLM_BOUNDS

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    "HF_HUB_OFFLINE": "1",
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_PLUGINS": "steer",
    **VLLM_BOUNDS,
}
"""One process, few threads: the same batches, and so the same bits, in every run."""

for _name, _value in ENVIRONMENT.items():
    os.environ.setdefault(_name, _value)

import demo_specs  # noqa: E402
import inner_specs  # noqa: E402
from steer_vectors import LIBRARY  # noqa: E402

from steer.engines.base import Engine  # noqa: E402
from steer.engines.vllm.front.engine import VllmEngine  # noqa: E402
from steer.plan.cache import PlanCache  # noqa: E402
from steer.plan.plan import SteeringPlan  # noqa: E402
from steer.registry.registry import Registry  # noqa: E402

Plans = dict[str, SteeringPlan | None]
"""Plans by the name of their spec; None is unsteered."""

DEMO_MODEL = LIBRARY / "demo" / "model"


OPTIONS: dict[str, Any] = {
    "model": str(DEMO_MODEL),
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 256,
    "block_size": 32,
    "gpu_memory_utilization": 0.3,
}

ALL_SITES: dict[str, Any] = {"additional_config": {"steer": {"sites": "all"}}}
"""The sites inside attention and MLP are tapped as well."""


def start_engine(registry: Path, **options: Any) -> VllmEngine:
    """vLLM with steering over the demo model; `options` are vLLM's."""
    return VllmEngine.load(registry=registry, **(OPTIONS | options))


def fill_registry(folder: Path) -> None:
    """Puts the artefacts there that the specs of `demo_specs` and `inner_specs` name."""
    with Registry.open(folder) as registry:
        demo_specs.register(registry)
        inner_specs.register(registry)


def plans_for(engine: Engine) -> Plans:
    """All those specs as plans, but for those at a site that `engine` does not have."""
    stream = demo_specs.compiled(PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities))
    inner = inner_specs.compiled(engine.info, engine.capabilities)
    return stream | inner | demo_specs.token_plans(engine)


def plans_with_spans(engine: Engine) -> Plans:
    """Those, and the specs that select by texts, roles and number."""
    return plans_for(engine) | demo_specs.span_plans(engine.info, engine.capabilities)


def plain(receipt: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """A receipt without its floats, which engines agree on only to rounding, and without what was
    drafted for it."""
    if receipt is None:
        return None
    receipt = {k: v for k, v in receipt.items() if k != "speculation"}
    points = [{k: v for k, v in p.items() if k != "relative_size"} for p in receipt["hook_points"]]
    gates = [{k: v for k, v in g.items() if k != "value"} for g in receipt["gates"]]
    return {**receipt, "hook_points": points, "gates": gates}
