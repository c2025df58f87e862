"""The transformers engine's part, tried on a CPU with a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.gpu.cases import Progress, results, run_cases
from benchmarks.gpu.device import Host
from benchmarks.gpu.engine import PLAIN, Engines, Work
from benchmarks.kept import Kept
from benchmarks.vllm.shapes import Shape

TINY = Shape("tiny", d_model=32, layers=4, heads=4, ffn=64, vocabulary=64, kv_heads=2)
WORK = Work(chats=4, prompt=8, tokens=4, rounds=1, compared=4, shallow=4)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Kept:
    found = Kept(tmp_path_factory.mktemp("gpu") / "gpu.json", {}, {})
    part = Engines(TINY, Host(), WORK, None)
    assert part.missing() is None
    assert run_cases(found, part.cases(), Host(), limit_seconds=1e9) == Progress(4, 0, 0), (
        found.results
    )
    return found


@pytest.mark.parametrize("batching", ["packed", "rolling"])
def test_a_steered_batch_is_each_request_alone(kept: Kept, batching: str) -> None:
    found = kept[f"engine/alone/tiny, 4 layers/{batching}/float32"]
    assert found["holds"]
    assert found["share"] == 1.0
    assert found["answers_changed"] > 0


def test_the_table_tells_everybody_beside_plain_generate(kept: Kept, tmp_path: Path) -> None:
    part = Engines(TINY, Host(), WORK, None)
    rows = part.table(results(kept, "engine")).rows
    speeds = [row for row in rows if "tokens/s" in row[3]]
    assert {row[2] for row in speeds} >= {PLAIN, "Steer, all kinds"}
    assert len(speeds) == 8
    assert all(row[4] == "yes" for row in rows if row[2] == "together as alone")
