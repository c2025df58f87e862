"""Read-outs of a model that several workers have: split within its layers, or between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import readouts_runner
import vllm_engine
from child_runs import run_child
from readout_crowd import register

from steer.registry.registry import Registry

EVERYWHERE = ["features", "norms", "projections", "relative_size"]


@pytest.mark.parametrize(
    ("options", "readouts"),
    [
        ({"tensor_parallel_size": 2}, [*EVERYWHERE, "lens", "kl"]),
        ({"pipeline_parallel_size": 2}, EVERYWHERE),
    ],
    ids=["tensor", "pipeline"],
)
def test_a_crowd_is_read_as_a_capture_reads_it(
    options: dict[str, Any], readouts: list[str], tmp_path: Path
) -> None:
    """Tensor-parallel workers read whole states, each stage of a pipeline those of its layers."""
    with Registry.open(tmp_path / "registry") as registry:
        register(registry)
    job = {
        "registry": str(tmp_path / "registry"),
        "options": {**vllm_engine.OPTIONS, **options},
        "readouts": readouts,
    }
    run_child(Path(readouts_runner.__file__), job, tmp_path, "readouts")
