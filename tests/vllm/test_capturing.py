"""States of a data set on vLLM: what one capture of a text reads, and what transformers reads."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import vllm_engine
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Engine
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.fit.bulk.shards import CapturedStates
from steer.fit.requests.states import StatesRequest
from steer.model import HookPoint

pytestmark = pytest.mark.slow

POINTS = (HookPoint(2), HookPoint(4, "mlp_out"), HookPoint(5))
PROMPTS: list[Any] = [
    [{"role": "user", "content": "Where does the wolf live?"}],
    {"tokens": [5, 6, 7, 8, 9, 10, 11]},
    "The owl lives in",
    [{"role": "user", "content": "Where does the owl live, and where the fox?"}],
    {"prompt": [{"role": "user", "content": "Who lives there?"}], "response": "The owl."},
] * 3
ROW = torch.randn(192, generator=torch.Generator().manual_seed(1))
BODY: dict[str, Any] = {
    "prompts": PROMPTS,
    "points": [{"layer": point.layer, "site": point.site} for point in POINTS],
    "batch": 4,
}
STEERED: dict[str, Any] = {
    **BODY,
    "answer_tokens": 5,
    "temperature": 0.0,
    "steering": {
        "interventions": [
            {
                "kind": "add",
                "vector": "v",
                "strength": 0.5,
                "where": {"phases": ["generation"]},
            }
        ]
    },
}


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[VllmEngine, TransformersEngine]]:
    with (
        TransformersEngine.load(str(vllm_engine.DEMO_MODEL), dtype="float32") as reference,
        vllm_engine.start_engine(tmp_path_factory.mktemp("registry")) as running,
    ):
        yield running, reference


def kept(engine: Engine, body: dict[str, Any], folder: Path) -> dict[HookPoint, CapturedStates]:
    request = StatesRequest.model_validate(body)
    library = MemoryLibrary({"v": ControlVector.of({3: ROW}, name="v")})
    plan_of = plans_of(engine, library).plan
    request.check(engine, plan_of)
    request.run(engine, folder, plan_of=plan_of)
    return {point: CapturedStates.open(folder, point, verify=True) for point in POINTS}


def every(states: CapturedStates) -> Tensor:
    return states.rows(np.arange(len(states)))


def test_a_row_is_what_one_capture_reads(
    engines: tuple[VllmEngine, TransformersEngine], tmp_path: Path
) -> None:
    running, _ = engines
    found = kept(running, BODY, tmp_path / "four")
    other = kept(running, {**BODY, "batch": 1, "shard_mib": 1}, tmp_path / "one")
    first = found[POINTS[0]]
    for n in range(len(PROMPTS)):
        numbers = np.flatnonzero(first.texts == n)
        [alone] = running.capture(CaptureRequest([first.tokens[numbers].tolist()], POINTS))
        for point in POINTS:
            rows = found[point].rows(numbers)
            torch.testing.assert_close(rows, alone.states[point], rtol=1e-5, atol=1e-5)
    for point in POINTS:
        torch.testing.assert_close(every(found[point]), every(other[point]), rtol=1e-5, atol=1e-5)


def test_answers_under_a_spec_are_those_of_the_reference(
    engines: tuple[VllmEngine, TransformersEngine], tmp_path: Path
) -> None:
    mine, theirs = (kept(engine, STEERED, tmp_path / str(n)) for n, engine in enumerate(engines))
    for point in POINTS:
        assert mine[point].generated.any()
        for name in ("tokens", "texts", "positions", "generated", "digests"):
            assert (getattr(mine[point], name) == getattr(theirs[point], name)).all(), name
        torch.testing.assert_close(every(mine[point]), every(theirs[point]), rtol=1e-3, atol=2e-4)
