"""Gates whose decisions travel through the stages of a pipeline, decided in kernels.

Requests with clamps that compete run in Python beside them (`MixedPass`).
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"

import torch
from stages import BATCH, MODEL, RUNNING, assert_stages_do_what_one_worker_does
from torch import Tensor

from steer.engines.vllm.static.form import StaticForm
from steer.engines.vllm.static.operators import set_form
from steer.engines.vllm.taps.taps import DecoderStack
from steer.engines.vllm.worker.edits import Edits, StaticEdits, TapEdits

CPU = torch.device("cpu")


def in_kernels(stack: DecoderStack) -> StaticEdits:
    form = StaticForm(
        MODEL, stack.taps, max_requests=RUNNING, batch_tokens=BATCH, edit_rows=256, device=CPU
    )
    return StaticEdits(form, TapEdits(MODEL, RUNNING, CPU))


def visit(edits: Edits, tap: int, hidden: Tensor, residual: Tensor) -> None:
    assert isinstance(edits, StaticEdits)
    set_form(edits._form)
    torch.ops.steer.edit_pair(hidden, residual, tap)


def test_gates_rule_later_stages_as_they_rule_one_worker() -> None:
    assert_stages_do_what_one_worker_does(2, (2, 4), in_kernels, visit, requests=25)
