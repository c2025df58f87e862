"""What workers answer is read as it was written."""

from __future__ import annotations

import pytest

from steer.engines.base import (
    GateReceipt,
    PointReceipt,
    RampReceipt,
    Receipt,
    SpeculationReceipt,
)
from steer.engines.vllm.messages import read_receipt
from steer.engines.vllm.pipeline import merged_answers
from steer.model import HookPoint

PLAIN = Receipt("f", 10, 2, 3, (PointReceipt(HookPoint(2), 10, 0.1),), (GateReceipt("g", 4, 0.7),))
DRAFTED = Receipt("f", 10, 2, 3, speculation=SpeculationReceipt(drafted=8, accepted=5))
RAMPED = Receipt(
    "f", 10, 2, ramps=(RampReceipt(((0, 1.0), (8, 0.0)), 10, 0.25), RampReceipt(((3, 0.5),), 0))
)


@pytest.mark.parametrize("receipt", [PLAIN, DRAFTED, RAMPED], ids=["plain", "drafted", "ramped"])
def test_a_receipt_is_read_as_it_was_written(receipt: Receipt) -> None:
    assert read_receipt(receipt.as_json()) == receipt


def test_stages_of_a_pipeline_tell_once_what_was_drafted() -> None:
    (answer,) = merged_answers([[{0: DRAFTED.as_json()}], [{0: DRAFTED.as_json()}]])
    assert read_receipt(answer[0]) == DRAFTED
