"""The methods on synthetic activations with a planted direction."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steer.fit.methods.diffmean import DifferenceOfMeans
from steer.fit.methods.method import METHODS
from steer.fit.methods.pca import UncentredPCA

WIDTH = 64


def planted(
    pairs: int, *, noise: float, gap: float = 2.0, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """A unit direction, and states that differ by a constant step along it plus noise."""
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(WIDTH, generator=generator)
    direction = direction / direction.norm()
    shared = 3.0 * torch.randn(pairs, WIDTH, generator=generator)
    positive = shared + gap * direction + noise * torch.randn(pairs, WIDTH, generator=generator)
    negative = shared + noise * torch.randn(pairs, WIDTH, generator=generator)
    return direction, positive, negative


def fitted(method: str, positive: Tensor, negative: Tensor, batch: int = 16) -> Tensor:
    one = METHODS[method](WIDTH)
    for first in range(0, len(positive), batch):
        one.add(positive[first : first + batch], negative[first : first + batch])
    return one.direction()


def cosine(a: Tensor, b: Tensor) -> float:
    return float(torch.cosine_similarity(a, b, dim=0))


@pytest.mark.parametrize("method", METHODS)
def test_a_planted_direction_is_recovered_with_its_sign_and_length(method: str) -> None:
    direction, positive, negative = planted(400, noise=0.2)
    found = fitted(method, positive, negative)
    assert cosine(found, direction) >= 0.99
    assert float(found.norm()) == pytest.approx(2.0, rel=0.02)
    assert cosine(fitted(method, negative, positive), -direction) >= 0.99


def test_centring_the_differences_would_lose_the_direction() -> None:
    direction, positive, negative = planted(400, noise=0.2)
    differences = positive - negative
    centred = torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[0]
    assert abs(cosine(centred, direction)) < 0.5
    assert cosine(fitted("pca", positive, negative), direction) >= 0.99


def test_centring_loses_it_on_average_too() -> None:
    """The mean |cosine| over 20 draws: what a random direction has in 64 dimensions, about .1."""
    found = []
    for seed in range(20):
        direction, positive, negative = planted(400, noise=0.2, seed=seed)
        differences = positive - negative
        centred = torch.linalg.svd(differences - differences.mean(0), full_matrices=False).Vh[0]
        found.append(abs(cosine(centred, direction)))
    assert 0.03 < sum(found) / len(found) < 0.2


@given(st.integers(1, 70), st.sampled_from(sorted(METHODS)))
def test_batches_do_not_matter(batch: int, method: str) -> None:
    _, positive, negative = planted(130, noise=0.5)
    whole = fitted(method, positive, negative, batch=len(positive))
    torch.testing.assert_close(
        fitted(method, positive, negative, batch=batch), whole, rtol=1e-4, atol=1e-5
    )


def test_the_mean_difference_is_exact() -> None:
    _, positive, negative = planted(33, noise=1.0)
    expected = (positive.double().mean(0) - negative.double().mean(0)).float()
    torch.testing.assert_close(fitted("diffmean", positive, negative), expected)


def test_pca_equals_the_decomposition_of_all_differences() -> None:
    _, positive, negative = planted(500, noise=1.0)
    differences = (positive - negative).double()
    values, vectors = torch.linalg.eigh(differences.T @ differences)
    component = vectors[:, values.argmax()].float()
    assert abs(cosine(fitted("pca", positive, negative, batch=7), component)) >= 1 - 1e-6


def test_memory_does_not_grow_with_the_pairs() -> None:
    mean, pca = DifferenceOfMeans(WIDTH), UncentredPCA(WIDTH)
    for seed in range(40):
        _, positive, negative = planted(100, noise=1.0, seed=seed)
        mean.add(positive, negative)
        pca.add(positive, negative)
        assert mean.held_floats == 2 * WIDTH
        assert pca.held_floats <= 3 * WIDTH * WIDTH + WIDTH


@pytest.mark.parametrize("method", METHODS)
def test_equal_classes_have_no_direction(method: str) -> None:
    states = torch.randn(8, WIDTH, generator=torch.Generator().manual_seed(1))
    assert not fitted(method, states, states).any()
