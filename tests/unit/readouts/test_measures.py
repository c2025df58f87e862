"""Long rows are ranked by parts; what comes out is what a sort of the whole row says."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steer.readouts.measures import predicted, ranked


@pytest.mark.parametrize("length", [4096, 4097, 50_257, 49_152, 128_256, 7, 300])
@pytest.mark.parametrize("k", [1, 5, 16, 400])
def test_the_largest_of_each_row_are_found_where_they_stand(length: int, k: int) -> None:
    generator = torch.Generator().manual_seed(length + k)
    numbers = torch.randn(5, length, generator=generator)
    numbers[1, -3:] = torch.tensor([7.0, 9.0, 8.0])  # in what is left over behind whole parts
    numbers[2, : min(64, length)] += 10.0  # all in one part
    numbers[3] = -torch.inf
    numbers[3, length // 2] = 0.0
    found = ranked(numbers, k)
    wanted = -np.sort(-numbers.numpy(), axis=-1)[:, : min(k, length)]
    assert np.array_equal(found.values.numpy(), wanted)
    assert torch.equal(numbers.gather(-1, found.places), found.values)
    for row in found.places.tolist():
        assert len(set(row)) == len(row)


@pytest.mark.parametrize("length", [100, 5000])
def test_equals_are_told_once_each_and_nan_is_largest(length: int) -> None:
    numbers = torch.zeros(2, length)
    numbers[1, 70] = torch.nan
    found = ranked(numbers, 9)
    assert all(len(set(row)) == 9 for row in found.places.tolist())
    assert found.places[1, 0] == 70
    assert found.values[1, 0].isnan()
    assert not found.values[0].any()


def test_a_row_is_ranked_alike_alone_and_beside_others() -> None:
    """Equals too: whoever asks for the same twice gets the same."""
    numbers = torch.randint(0, 40, (64, 8192), generator=torch.Generator().manual_seed(3)).float()
    together = ranked(numbers, 8)
    for n in (0, 31, 63):
        assert torch.equal(ranked(numbers[n : n + 1], 8).places[0], together.places[n])


def test_likeliest_tokens_of_a_large_vocabulary() -> None:
    logits = 3 * torch.randn(3, 50_257, generator=torch.Generator().manual_seed(4))
    exact = torch.softmax(logits.double(), dim=-1)
    found = predicted(logits, 5)
    chances, places = exact.topk(5, dim=-1)
    assert torch.equal(found.likeliest.places, places)
    torch.testing.assert_close(found.likeliest.values.double(), chances, rtol=1e-5, atol=1e-9)
    entropies = -(exact * exact.log()).sum(-1)
    torch.testing.assert_close(found.entropies.double(), entropies, rtol=1e-5, atol=1e-6)
