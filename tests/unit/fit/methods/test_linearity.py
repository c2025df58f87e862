"""The preflights on planted data."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steer.errors import SteerError
from steer.fit.methods.linearity import Parallelism, intrinsic_dimension


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def mean_cosine(positive: Tensor, negative: Tensor, batch: int = 7) -> float | None:
    one = Parallelism(positive.shape[1])
    for first in range(0, len(positive), batch):
        one.add(positive[first : first + batch], negative[first : first + batch])
    return one.mean_cosine()


def test_a_linear_concept_has_parallel_differences_and_a_random_one_not() -> None:
    shared, direction = draw(200, 64), draw(64, seed=1)
    planted = mean_cosine(shared + 2 * direction + 0.3 * draw(200, 64, seed=2), shared)
    random = mean_cosine(shared, draw(200, 64, seed=3))
    assert planted is not None
    assert planted >= 0.8
    assert random is not None
    assert abs(random) < 0.02


def test_the_mean_cosine_is_that_of_all_pairs() -> None:
    positive, negative = draw(23, 8), draw(23, 8, seed=1)
    unit = torch.nn.functional.normalize(positive.double() - negative.double(), dim=-1)
    cosines = unit @ unit.T
    direct = (cosines.sum() - cosines.trace()) / (23 * 22)
    assert mean_cosine(positive, negative) == pytest.approx(float(direct), abs=1e-12)
    assert mean_cosine(positive[:1], negative[:1]) is None
    assert mean_cosine(positive, positive) is None


@pytest.mark.parametrize("dimension", [2, 5, 10])
def test_the_dimension_of_a_cube_in_a_larger_space(dimension: int) -> None:
    cube = torch.rand(2000, dimension, generator=torch.Generator().manual_seed(0))
    rotation = torch.linalg.qr(draw(64, 64)).Q[:dimension]
    assert intrinsic_dimension(cube @ rotation) == pytest.approx(dimension, rel=0.2)


def test_the_dimension_ignores_duplicates_scale_and_chunks() -> None:
    states = draw(300, 4)
    found = intrinsic_dimension(states)
    assert intrinsic_dimension(torch.cat([states, states])) == pytest.approx(found)
    assert intrinsic_dimension(1000 * states + 5) == pytest.approx(found, rel=1e-3)
    assert intrinsic_dimension(states, chunk=17) == pytest.approx(found)
    with pytest.raises(SteerError) as caught:
        intrinsic_dimension(states[:1].repeat(100, 1))
    assert caught.value.code == "no_states"
