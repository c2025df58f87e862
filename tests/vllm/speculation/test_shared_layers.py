"""A server whose drafter runs through layers that are steered does not start."""

from __future__ import annotations

from pathlib import Path

import pytest
import vllm_engine
from torch import nn
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from steer.errors import Unsupported


def test_a_drafter_that_runs_through_tapped_layers_stops_the_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def of_the_models_layers(runner: GPUModelRunner) -> nn.Module:
        return nn.Sequential(runner.get_model().model.layers[1])

    monkeypatch.setattr(GPUModelRunner, "get_draft_model", of_the_models_layers)
    with (
        pytest.raises(Unsupported, match="drafts tokens with a") as caught,
        vllm_engine.start_engine(tmp_path),
    ):
        pass
    assert caught.value.code == "speculative_decoding"
