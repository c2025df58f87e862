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
from steer.batch.ledger import DRAFTED, UNSEEN, PositionLedger
from steer.model import HookPoint

CPU = torch.device("cpu")
ROWS = torch.tensor([0, 0, 1, 2, 2])
POSITIONS = np.array([0, 1, 3, 2, 3])
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
    ledger.expect(ROWS.numpy(), POSITIONS)
    kept = ledger.contained(ROWS, before, after)
    sound = torch.arange(len(ROWS)) != place
    assert torch.equal(kept[sound], after[sound])
    assert torch.equal(kept[place], before[place])
    for row in range(3):
        at = int(POSITIONS[place]) if row == int(ROWS[place]) else None
        assert [ledger.runs_over(row, end) for end in range(5)] == [
            at is not None and at < end for end in range(5)
        ]


def test_a_state_that_was_beyond_all_numbers_is_no_fault_of_the_edit() -> None:
    ledger = PositionLedger(3, 4, CPU)
    before, after = states(torch.float32)
    before[1, 0] = after[1, 0] = math.nan
    ledger.expect(ROWS.numpy(), POSITIONS)
    ledger.contained(ROWS, before, after)
    assert not any(ledger.runs_over(row, 4) for row in range(3))


def test_sound_states_together_may_be_beyond_all_numbers() -> None:
    ledger = PositionLedger(3, 4, CPU)
    before, after = states(torch.float32)
    after[:, 0] = 1.5e19  # its square is in float32's range, and the sum of two is not
    ledger.expect(ROWS.numpy(), POSITIONS)
    assert torch.equal(ledger.contained(ROWS, before, after), after)
    assert not any(ledger.runs_over(row, 4) for row in range(3))


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


DRAFTS = 3
POINT = HookPoint(1)


class Verified:
    """Passes over one request, row 1 of a ledger: some tokens, the last of them drafted."""

    def __init__(self) -> None:
        self.ledger = PositionLedger(2, 40, CPU, drafts=DRAFTS)

    def compute(self, start: int, count: int, drafts: int, *, lost: int | None = None) -> None:
        """A pass over `count` tokens from `start` on; the one at position `lost` runs over. The
        size of each edit is its position, and the rules applied are those of its last digit."""
        ledger, positions = self.ledger, np.arange(start, start + count)
        self.stays(start)
        if drafts:
            first = np.array([start + count - drafts])
            ledger.draft(np.array([1]), first, np.array([drafts]))
        rows = np.ones_like(positions)
        ledger.expect(rows, positions)
        sizes = torch.from_numpy(positions).float()
        ledger.add_relative(POINT, torch.from_numpy(rows), sizes, sizes >= 0)
        at, rows_on_device = torch.from_numpy(positions), torch.from_numpy(rows)
        ledger.lose(rows_on_device, at, at == (-1 if lost is None else lost))
        ledger.record(rows, positions % 10)

    def stays(self, fed: int) -> None:
        self.ledger.settle(np.array([1]), np.array([fed]))


def test_a_position_counts_as_accepted_where_its_token_was_drafted_and_stayed() -> None:
    one = Verified()
    one.compute(0, 10, 0)
    one.compute(10, 4, 3)  # 11 to 13 are drafted
    one.compute(12, 3, 2)  # 11 stayed, 12 is another token; 13 and 14 are drafted
    one.compute(15, 1, 0)  # both stayed
    assert one.ledger.drafted.tolist() == [0, 5]
    assert [one.ledger.accepted(1, end) for end in (11, 12, 13, 14, 16)] == [0, 1, 1, 2, 3]
    assert (one.ledger.applied[1, :16] & ~np.uint16(DRAFTED)).tolist() == [
        n % 10 for n in range(16)
    ]


def test_a_draft_that_did_not_stay_is_unseen_until_its_position_is_computed() -> None:
    """A pass that nobody saw must not be hidden by what was drafted before it."""
    one = Verified()
    one.compute(0, 10, 0)
    one.compute(10, 4, 3)
    one.stays(12)
    assert (one.ledger.applied[1] != UNSEEN).sum() == 12


def test_a_drafted_token_that_stayed_still_counts_when_it_is_computed_again() -> None:
    one = Verified()
    one.compute(0, 10, 0)
    one.compute(10, 4, 3)
    one.stays(13)
    one.compute(0, 13, 0)  # after a preemption
    assert one.ledger.accepted(1, 13) == 2


@pytest.mark.parametrize("stayed", range(DRAFTS + 1))
def test_the_sizes_of_drafts_that_did_not_stay_are_no_part_of_the_mean(stayed: int) -> None:
    one = Verified()
    one.compute(0, 4, 0)
    one.compute(4, 4, 3)  # 5 to 7 are drafted
    one.stays(5 + stayed)
    kept = range(5 + stayed)
    assert one.ledger.relative[POINT].mean(1) == pytest.approx(sum(kept) / len(kept))
    assert one.ledger.relative[POINT].mean(0) is None


def test_what_is_not_settled_yet_is_no_part_of_the_mean() -> None:
    one = Verified()
    one.compute(0, 4, 0)
    one.compute(4, 4, 3)
    assert one.ledger.unsettled
    assert one.ledger.relative[POINT].mean(1) == pytest.approx((0 + 1 + 2 + 3 + 4) / 5)


@pytest.mark.parametrize(("lost", "over"), [(4, True), (5, True), (6, False), (7, False)])
def test_only_tokens_that_stayed_run_over(lost: int, over: bool) -> None:
    one = Verified()
    one.compute(0, 4, 0)
    one.compute(4, 4, 3, lost=lost)
    one.compute(6, 2, 0)
    assert one.ledger.runs_over(1, 8) is over


def test_a_copied_row_and_a_grown_ledger_keep_what_is_not_settled() -> None:
    one = Verified()
    one.compute(0, 4, 0)
    one.compute(4, 4, 3, lost=6)
    one.ledger.grow()
    alone = one.ledger.row(1, 4)
    for ledger, row in ((alone, 0), (one.ledger, 1)):
        ledger.settle(np.array([row]), np.array([6]))
        assert ledger.drafted[row] == 3
        assert ledger.accepted(row, 6) == 1
        assert not ledger.runs_over(row, 6)
        assert ledger.relative[POINT].mean(row) == pytest.approx(sum(range(6)) / 6)


def test_the_next_request_of_a_row_inherits_nothing() -> None:
    one = Verified()
    one.compute(0, 4, 0)
    one.compute(4, 4, 3, lost=6)
    one.ledger.reset(1)
    assert not one.ledger.unsettled
    assert not one.ledger.runs_over(1, 40)
    assert one.ledger.relative[POINT].mean(1) is None
    assert (one.ledger.applied[1] == UNSEEN).all()
