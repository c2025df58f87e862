"""The benchmark of clamps compares two ways to the same tokens."""

from __future__ import annotations

import pytest
import torch

from benchmarks.saes import clamps


@pytest.mark.parametrize("batch", [1, 5])
def test_both_contestants_do_the_same(batch: int) -> None:
    sae = clamps.random_sae(64, 16)
    x = clamps.tokens(batch, 16)
    after = clamps.steered(sae, batch)(x)
    assert not torch.equal(after, x)
    torch.testing.assert_close(after, clamps.usual_hook(sae)(x), rtol=1e-5, atol=1e-5)


def test_it_reports_the_hook_and_every_size() -> None:
    rows = clamps.run(1, width=16, latents=64, narrow=8, sizes=(16, 32), batches=(1, 2))
    assert [name for name, *_ in rows] == [
        "usual hook, 64 × 16, 1 tokens",
        "8 features clamped, 64 × 16, 1 tokens",
        "largest difference between the two",
        "usual hook, 64 × 16, 2 tokens",
        "8 features clamped, 64 × 16, 2 tokens",
        "largest difference between the two",
        "8 features of 16 × 8, 2 tokens",
        "8 features of 32 × 8, 2 tokens",
    ]
