"""Semi-nonnegative factorisation on planted factors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from steer.errors import SteerError
from steer.fit.methods.dictionaries.semi_nmf import (
    fitted_components,
    semi_nmf,
    sparse,
    unit_components,
    updated_weights,
)

D, K, N = 200, 6, 600


def planted(*, support: int | None, noise: float = 0.02, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Unit components of both signs `[K, D]`, each on `support` entries, and rows that are sparse
    nonnegative sums of them."""
    generator = torch.Generator().manual_seed(seed)
    components = torch.randn(K, D, generator=generator)
    if support is not None:
        components = sparse(components, support / D)
    components = components / components.norm(dim=1, keepdim=True)
    active = torch.rand(N, K, generator=generator) < 0.3
    weights = torch.rand(N, K, generator=generator) * active
    rows = weights @ components + noise / D**0.5 * torch.randn(N, D, generator=generator)
    return components, rows


def matched(found: Tensor, components: Tensor) -> Tensor:
    """For each planted component, the cosine of the one most like it: signs count."""
    return (components.double() @ found.T).max(dim=1).values


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("support", "keep", "penalty"), [(None, None, 0.01), (2, 0.01, 0.0)])
def test_planted_factors_are_recovered(
    support: int | None, keep: float | None, penalty: float, seed: int
) -> None:
    """Sparse components, or sparse weights: with neither, many factors explain the data alike."""
    components, rows = planted(support=support, seed=seed)
    found = semi_nmf(rows, K, keep=keep, penalty=penalty, iterations=200, seed=seed)
    assert float(matched(found.components, components).min()) >= 0.95
    assert bool((found.weights >= 0).all())
    assert found.explained > 0.95
    if keep is not None:
        assert bool(((found.components != 0).sum(1) <= 2).all())


def test_the_update_of_plain_nmf_diverges_on_signed_data() -> None:
    """G ⊙ P/(GQ) from the same start: weights become negative and grow without bound, or are no
    numbers; the semi-NMF update stays nonnegative and improves."""
    _, rows = planted(support=None)
    rows = rows.double()
    start = torch.rand(N, K, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) + 0.1

    def error(weights: Tensor) -> float:
        return float((rows - weights @ fitted_components(rows, weights)).pow(2).sum())

    plain, ours = start, start
    for _ in range(100):
        z = fitted_components(rows, plain)
        plain = plain * (rows @ z.T) / (plain @ (z @ z.T))
        ours = updated_weights(rows, fitted_components(rows, ours), ours)
    broken = not bool(plain.isfinite().all()) or bool((plain < 0).any())
    assert broken
    assert bool((ours >= 0).all())
    assert error(ours) < 0.5 * error(start)


def test_the_error_never_grows_without_sparsity() -> None:
    _, rows = planted(support=None, noise=0.5)
    found = [semi_nmf(rows, K, iterations=n).explained for n in (1, 2, 5, 20, 80)]
    assert found == sorted(found)


def test_only_the_largest_entries_are_kept_and_the_length_too() -> None:
    components = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    thin = sparse(components, 0.01)
    assert (thin != 0).sum(1).tolist() == [3] * 4
    torch.testing.assert_close(thin.norm(dim=1), components.norm(dim=1))
    largest = components.abs().topk(3, dim=1).indices.sort().values
    assert torch.equal(thin.abs().topk(3, dim=1).indices.sort().values, largest)
    assert (sparse(components, 1e-9) != 0).sum(1).tolist() == [1] * 4


def test_scaling_keeps_the_product() -> None:
    generator = torch.Generator().manual_seed(0)
    components = torch.randn(4, 9, dtype=torch.float64, generator=generator)
    weights = torch.rand(5, 4, dtype=torch.float64, generator=generator)
    unit, scaled = unit_components(components, weights)
    torch.testing.assert_close(scaled @ unit, weights @ components)
    torch.testing.assert_close(unit.norm(dim=1), torch.ones(4, dtype=torch.float64))


def test_a_price_on_weights_shrinks_them() -> None:
    _, rows = planted(support=None)
    free, dear = (semi_nmf(rows, K, penalty=p, iterations=50).weights for p in (0.0, 0.3))
    assert float(dear.sum()) < 0.9 * float(free.sum())


def test_the_same_seed_gives_the_same_factors() -> None:
    _, rows = planted(support=None)
    torch.testing.assert_close(
        semi_nmf(rows, K, seed=3).components, semi_nmf(rows, K, seed=3).components, rtol=0, atol=0
    )


@pytest.mark.parametrize(
    "options", [{"count": 0}, {"count": 11}, {"keep": 0.0}, {"keep": 1.5}, {"penalty": -1.0}]
)
def test_impossible_requests_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(SteerError) as caught:
        semi_nmf(torch.ones(10, 4), **{"count": 2, **options})  # type: ignore[arg-type]
    assert caught.value.code == "invalid_option"
