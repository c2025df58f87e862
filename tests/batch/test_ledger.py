"""What the ledger keeps by position, and what it keeps out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from steer.batch import ledger as module
from steer.batch.ledger import UNSEEN, PositionLedger

CPU = torch.device("cpu")
ROWS = torch.tensor([0, 0, 1, 2, 2])
BEYOND = {
    "infinite": math.inf,
    "minus infinite": -math.inf,
    "no number": math.nan,
    "a norm beyond float32": 1e30,
}


class Operations(TorchDispatchMode):
    """Counts torch's operations."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def states(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    before, after = (torch.randn(len(ROWS), 8, generator=generator).to(dtype) for _ in range(2))
    return before, after


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("beyond", BEYOND.values(), ids=BEYOND)
@pytest.mark.parametrize("place", range(len(ROWS)))
def test_what_an_edit_drives_beyond_all_numbers_is_kept_out(
    dtype: torch.dtype, beyond: float, place: int
) -> None:
    ledger = PositionLedger(3, 4, CPU)
    before, after = states(dtype)
    after[place, 5] = beyond
    kept = ledger.contained(ROWS, before, after)
    sound = torch.arange(len(ROWS)) != place
    assert torch.equal(kept[sound], after[sound])
    assert torch.equal(kept[place], before[place])
    assert ledger.not_finite.tolist() == [row == int(ROWS[place]) for row in range(3)]


def test_a_state_that_was_beyond_all_numbers_is_no_fault_of_the_edit() -> None:
    ledger = PositionLedger(3, 4, CPU)
    before, after = states(torch.float32)
    before[1, 0] = after[1, 0] = math.nan
    ledger.contained(ROWS, before, after)
    assert not ledger.not_finite.any()


def test_sound_states_together_may_be_beyond_all_numbers() -> None:
    ledger = PositionLedger(3, 4, CPU)
    before, after = states(torch.float32)
    after[:, 0] = 1.5e19  # its square is in float32's range, and the sum of two is not
    assert torch.equal(ledger.contained(ROWS, before, after), after)
    assert not ledger.not_finite.any()


def test_a_sound_pass_is_looked_at_once() -> None:
    ledger = PositionLedger(3, 4, CPU)
    before, after = states(torch.float32)
    with Operations() as operations:
        assert ledger.contained(ROWS, before, after) is after
    counted = [name for name in operations.names if name not in ("view", "_local_scalar_dense")]
    assert counted == ["dot"]


PROMPT = 20
SEEN = {
    "nothing": ([], 0),
    "a part of the prompt": (range(7), 7),
    "behind a cached beginning": (range(12, 18), 18),
    "with a hole from the cache": ([0, 1, *range(10, PROMPT), PROMPT], PROMPT + 1),
    "all of the prompt from the cache but its end": ([PROMPT - 1], PROMPT),
    "a few tokens": (range(PROMPT + 3), PROMPT + 3),
    "all that are looked at together": (range(PROMPT + 256), PROMPT + 256),
    "many": (range(5, PROMPT + 1000), PROMPT + 1000),
    "all there is": (range(2000), 2000),
}


@pytest.mark.parametrize(("positions", "length"), SEEN.values(), ids=SEEN)
def test_a_row_is_as_long_as_what_was_computed(positions: Any, length: int) -> None:
    ledger = PositionLedger(2, 2000, CPU)
    seen = np.array(list(positions), dtype=np.int64)
    ledger.write(np.ones_like(seen), seen, np.full_like(seen, 3))
    alone = ledger.row(1, PROMPT)
    assert alone.applied.shape == (1, length)
    assert np.array_equal(np.flatnonzero(alone.applied[0] != UNSEEN), seen)
    assert ledger.row(0, PROMPT).applied.shape == (1, 0)


def test_a_row_costs_what_its_request_used(monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = PositionLedger(1, 1 << 20, CPU)
    seen = np.arange(PROMPT + 40)
    ledger.write(np.zeros_like(seen), seen, np.ones_like(seen))
    looked: list[int] = []
    flatnonzero = np.flatnonzero

    def counted(values: Any) -> Any:
        looked.append(len(values))
        return flatnonzero(values)

    monkeypatch.setattr(module.np, "flatnonzero", counted)
    ledger.row(0, PROMPT)
    assert sum(looked) <= 256
