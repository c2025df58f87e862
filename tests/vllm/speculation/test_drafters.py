"""Models that draft, beside the same steered requests without drafts.

Those of EAGLE, EAGLE-3, Medusa and MTP are random and small, so that nearly nothing of their drafts
stays; `draft_model` is the model itself, unsteered, so that what is steered little stays.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import demo_specs
import pytest
import vllm_engine
from speculation_runner import REQUESTS
from vllm_drafters import Drafter, drafters
from vllm_speculation import NGRAM

from steer.engines.base import Completion
from steer.engines.transformers.engine import TransformersEngine
from steer.plan.cache import PlanCache

RUNNER = Path(__file__).parents[2] / "support" / "vllm_side" / "speculation_runner.py"
SEED = 4
METHODS = ("eagle", "eagle3", "draft_model", "medusa", "mtp")
COMPILED = ("ngram", "eagle")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Drafter]:
    demo = vllm_engine.DEMO_MODEL
    found = drafters(tmp_path_factory.mktemp("drafters"), demo)
    return {**found, "ngram": Drafter(demo, NGRAM, None)}


@pytest.fixture(scope="module")
def runs(
    made: dict[str, Drafter], registry: Path, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    root = tmp_path_factory.mktemp("runs")
    engines = {name: (made[name], {}) for name in METHODS}
    engines |= {f"{name}, compiled": (made[name], {"enforce_eager": False}) for name in COMPILED}
    jobs = []
    for name, (one, options) in engines.items():
        job = {"model": str(one.target), "speculative_config": one.config, "options": options}
        job |= {"registry": str(registry), "seed": SEED, "out": str(root / f"{name}.answers")}
        jobs.append(root / f"{name}.job")
        jobs[-1].write_text(json.dumps(job))
    command = [sys.executable, str(RUNNER), *map(str, jobs)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = {}
    for name in engines:
        answers = root / f"{name}.answers"
        assert answers.exists(), f"{name}: {done.stderr[-20_000:]}"
        found[name] = json.loads(answers.read_text())
    return found


@pytest.fixture(scope="module")
def wanted(made: dict[str, Drafter]) -> dict[Path, list[Completion]]:
    """The answers of each target without drafts."""
    found = {}
    for target in {one.target for one in made.values()}:
        with TransformersEngine.load(target, name="steer-demo", dtype="float32") as engine:
            cache = PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities)
            requests = demo_specs.requests_for(demo_specs.compiled(cache), REQUESTS, seed=SEED)
            found[target] = engine.complete(requests)
    return found


@pytest.mark.parametrize("name", [*METHODS, *(f"{name}, compiled" for name in COMPILED)])
def test_answers_and_receipts_are_those_without_drafts(
    runs: dict[str, Any],
    made: dict[str, Drafter],
    wanted: dict[Path, list[Completion]],
    name: str,
) -> None:
    target = made[name.partition(",")[0]].target
    for mine, other in zip(runs[name]["answers"], wanted[target], strict=True):
        assert tuple(mine["tokens"]) == other.tokens
        assert mine["finish"] == other.finish
        if other.receipt is None:
            assert mine["receipt"] is None
            continue
        receipt = other.receipt.as_json()
        assert vllm_engine.plain(mine["receipt"]) == vllm_engine.plain(receipt)
        for a, b in zip(mine["receipt"]["hook_points"], receipt["hook_points"], strict=True):
            size = b.get("relative_size")
            assert a.get("relative_size") == (size and pytest.approx(size, rel=1e-3))
    assert runs[name]["slots in use"] == 0


@pytest.mark.parametrize("name", METHODS)
def test_drafters_are_not_tapped(runs: dict[str, Any], made: dict[str, Drafter], name: str) -> None:
    told = runs[name]
    assert told["drafter"] == made[name].model
    assert told["drafts"] > 10
    assert told["taps"] > 10
    assert told["taps while drafting"] == 0


def test_what_drafts_well_is_accepted(runs: dict[str, Any]) -> None:
    def share(name: str) -> float:
        found = [one["receipt"]["speculation"] for one in runs[name]["answers"] if one["receipt"]]
        assert sum(one["drafted"] for one in found) > 100
        return float(sum(one["accepted"] for one in found) / sum(one["drafted"] for one in found))

    assert share("draft_model") > 0.2
    for name in runs.keys() - {"draft_model", "ngram, compiled"}:
        assert share(name) < 0.1, name
