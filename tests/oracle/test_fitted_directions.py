"""Fitted directions against steering-vectors' aggregators, on the same paired states."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer.fit.methods.method import METHODS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def pairs() -> dict[str, torch.Tensor]:
    """States of 200 pairs that differ by a direction, an uneven spread, and noise."""
    generator = torch.Generator().manual_seed(3)
    spread = torch.linspace(0.2, 2.0, 48)
    negative = torch.randn(200, 48, generator=generator) * spread
    step = torch.randn(48, generator=generator)
    share = torch.rand(200, 1, generator=generator) + 0.5
    noise = 0.3 * torch.randn(200, 48, generator=generator)
    return {"positive": negative + share * step + noise, "negative": negative}


@pytest.fixture(scope="module")
def theirs(run_peer: Any, pairs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    outputs = run_peer("peers", "peer_aggregators.py", pairs)
    assert isinstance(outputs, dict)
    return outputs


def ours(method: str, pairs: dict[str, torch.Tensor]) -> torch.Tensor:
    fit = METHODS[method](48)
    for first in range(0, 200, 30):
        rows = slice(first, first + 30)
        fit.add(pairs["positive"][rows], pairs["negative"][rows])
    return fit.direction()


def test_the_difference_of_means_is_the_same(pairs, theirs):
    torch.testing.assert_close(ours("diffmean", pairs), theirs["diffmean"], atol=1e-5, rtol=1e-5)


def test_the_principal_component_is_the_same(pairs, theirs):
    component = ours("pca", pairs)
    unit = component / component.norm()
    torch.testing.assert_close(unit, theirs["pca"], atol=1e-5, rtol=1e-5)
    assert torch.cosine_similarity(unit, theirs["diffmean"], dim=0) < 0.99999
