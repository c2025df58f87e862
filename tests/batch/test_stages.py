"""Gates whose decisions travel through the stages of a pipeline."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from artefacts import SCOPES
from stages import (
    MODEL,
    PLANS,
    RUNNING,
    WIDTH,
    Pipeline,
    assert_stages_do_what_one_worker_does,
)
from torch import Tensor

from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.taps import DecoderStack
from steer.engines.vllm.ticket import Ticket
from steer.engines.vllm.worker.edits import Edits, TapEdits
from steer.engines.vllm.worker.prepared import BatchTokens
from steer.engines.vllm.worker.steering import WorkerSteering
from steer.spec import parse_spec


def in_python(stack: DecoderStack) -> TapEdits:
    return TapEdits(MODEL, RUNNING, torch.device("cpu"))


def visit(edits: Edits, tap: int, hidden: Tensor, residual: Tensor) -> None:
    ops.visit(tap, hidden, residual)


@pytest.mark.parametrize("cuts", [(1,), (3,), (4,), (2, 3), (1, 2, 3, 4)], ids=str)
@pytest.mark.parametrize("seed", range(2))
def test_gates_rule_later_stages_as_they_rule_one_worker(seed: int, cuts: tuple[int, ...]) -> None:
    assert_stages_do_what_one_worker_does(seed, cuts, in_python, visit)


@pytest.mark.parametrize("scope", SCOPES)
def test_a_stage_that_hears_of_no_decision_withholds_the_answer(
    monkeypatch: pytest.MonkeyPatch, scope: str
) -> None:
    spec = {
        "interventions": [{"kind": "add", "vector": "v0", "layers": [1, 4]}],
        "when": {"vector": "v1", "above": -1e9, "layer": 0, "scope": scope},
    }
    plan = PLANS.plan(parse_spec(spec))
    ticket = Ticket(
        "key",
        fingerprint=plan.fingerprint,
        plan=plan.fingerprint,
        selections=plan.selections,
        onward=plan.onward,
    )
    pipeline = Pipeline((3,), {plan.fingerprint: plan}, in_python, visit)
    tokens = np.array([1, 2, 3])

    def answer() -> dict[str, Any]:
        pipeline.admit("key", tokens.tolist(), ticket)
        batch = BatchTokens(["key"], np.array([0]), np.array([3]), lambda: tokens)
        pipeline.step(batch, torch.randn(3, WIDTH))
        pipeline.retire("key")
        return pipeline.receipt("key", 3)

    assert answer()["tokens_steered"] > 0
    monkeypatch.setattr(WorkerSteering, "decisions", lambda self: None)
    withheld = answer()
    assert withheld["code"] == "not_steered"
    assert "never reached 0.resid_post" in withheld["error"]
