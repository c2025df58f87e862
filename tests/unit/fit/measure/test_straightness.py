"""R² and straightness where they are known exactly (2406.11624)."""

from __future__ import annotations

import math

import pytest
import torch

from steer.fit.measure.straightness import curve_straightness, r_squared, straightness

T = torch.linspace(-1, 1, 20_001, dtype=torch.float64)


def test_a_straight_line_is_straight() -> None:
    line = T[:, None] * torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64) + 3
    assert straightness(line) == pytest.approx(1.0, abs=1e-12)
    assert r_squared(T.tolist(), (7 - 2 * T).tolist()) == pytest.approx(1.0, abs=1e-12)
    assert curve_straightness(T.tolist(), (7 - 2 * T).tolist()) == pytest.approx(1.0, abs=1e-12)


def test_a_semicircle_is_two_over_pi() -> None:
    angle = math.pi * (T + 1) / 2
    circle = torch.stack([angle.cos(), angle.sin()], dim=-1)
    assert straightness(circle) == pytest.approx(2 / math.pi, abs=1e-8)


def test_a_cube_is_four_fifths_linear() -> None:
    # Var(t)·Var(t³) = 1/3 · 1/7 and Cov = 1/5: R² = 21/25.
    assert r_squared(T.tolist(), (T**3).tolist()) == pytest.approx(0.84, abs=2e-4)


def test_a_step_is_the_least_straight_of_what_only_rises() -> None:
    x = [0.0, 0.5, 0.5, 1.0]
    assert curve_straightness(x, [0.0, 0.0, 1.0, 1.0]) == pytest.approx(1 / math.sqrt(2))
    back = curve_straightness([0.0, 1.0, 2.0], [0.0, 5.0, 1.0])
    assert back is not None
    assert back < 1 / math.sqrt(2)


def test_units_do_not_count() -> None:
    x, y = [0.0, 1.0, 2.0], [0.1, 0.2, 0.9]
    assert curve_straightness(x, y) == pytest.approx(
        curve_straightness([5 * a for a in x], [100 * b + 3 for b in y])
    )


def test_what_does_not_vary_has_no_line() -> None:
    assert r_squared([1, 2, 3], [4, 4, 4]) is None
    assert curve_straightness([1, 2, 3], [4, 4, 4]) is None
    assert straightness(torch.zeros(3, 2)) is None
