"""Gates whose decisions travel through the stages of a pipeline."""

from __future__ import annotations

import pytest
import torch
from stages import MODEL, RUNNING, assert_stages_do_what_one_worker_does
from torch import Tensor

from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.taps import DecoderStack
from steer.engines.vllm.worker.edits import Edits, TapEdits


def in_python(stack: DecoderStack) -> TapEdits:
    return TapEdits(MODEL, RUNNING, torch.device("cpu"))


def visit(edits: Edits, tap: int, hidden: Tensor, residual: Tensor) -> None:
    ops.visit(tap, hidden, residual)


@pytest.mark.parametrize("cuts", [(1,), (3,), (4,), (2, 3), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_gates_rule_later_stages_as_they_rule_one_worker(seed: int, cuts: tuple[int, ...]) -> None:
    assert_stages_do_what_one_worker_does(seed, cuts, in_python, visit)
