"""What a site's name promises, read from how far the states of its block move."""

from __future__ import annotations

import math

import pytest
import torch

from steer.engines.proof import follow, misplaced
from steer.model import HookPoint
from steer.spec import Site

SHIFT = torch.ones(1, 4)
SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")


END = HookPoint(0, "resid_post")


def states(**changes: float) -> dict[HookPoint, torch.Tensor]:
    read = [site for site in SITES if site in changes]
    return {HookPoint(0, site): torch.full((1, 4), float(changes[site])) for site in read}


@pytest.mark.parametrize("unread", ["nothing", "resid_pre", "attn_out", "resid_mid", "mlp_out"])
@pytest.mark.parametrize("end", [1.5, 1.7])
def test_sums_are_held_to_what_was_read(unread: str, end: float) -> None:
    """The first block of a pipeline's stage is handed its `resid_pre`, and reads it nowhere."""
    moved = states(resid_pre=0, attn_out=1, resid_mid=1, mlp_out=0.5, resid_post=end)
    point = HookPoint(0, "resid_mid" if unread == "attn_out" else "attn_out")
    read = {at: one for at, one in moved.items() if at.site != unread}
    unmoved = {at: torch.zeros(1, 4) for at in read}
    found = misplaced(point, SHIFT, read, unmoved, torch.float32)
    # Without `mlp_out` nothing says how far the block's end should move.
    assert found == (END if end != 1.5 and unread != "mlp_out" else None)


@pytest.mark.parametrize(
    ("dtype", "apart", "follows"),
    [
        (torch.bfloat16, (0.01, 0.09, 0.02, 0.01), True),
        (torch.bfloat16, (0.16, 0.01, 0.01, 0.02), True),
        (torch.bfloat16, (0.6, 0.01, 0.01, 0.01), False),
        (torch.bfloat16, (0.16, 0.16, 0.01, 0.01), False),
        (torch.bfloat16, (0.01, math.nan, 0.01, 0.01), False),
        (torch.float32, (1e-4, 1e-4, 1e-4, 1e-4), True),
        (torch.float32, (1e-4, 2e-3, 1e-4, 1e-4), False),
    ],
)
def test_one_place_may_be_rounded_away_and_no_more(
    dtype: torch.dtype, apart: tuple[float, ...], follows: bool
) -> None:
    rows = [torch.randn(500, generator=torch.Generator().manual_seed(n)) for n in range(4)]
    rows = [row - row.mean() for row in rows]
    moved = [row * (1 + share) for row, share in zip(rows, apart, strict=True)]
    assert follow(moved, rows, dtype) is follows
