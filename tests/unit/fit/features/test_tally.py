"""What a tally counts, against plain Python, however the stream is cut."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from steer.fit.features.examples import chance_of
from steer.fit.features.tally import SAMPLE, TOP, Tally
from steer.registry.features.survey import BINS, bin_of, edges_from, quantiles

D_IN, D_SAE, TEXTS = 6, 40, 90
ENCODER = torch.randn(D_IN, D_SAE, generator=torch.Generator().manual_seed(1))
BIASES = torch.linspace(-6, 1, D_SAE)  # from never to mostly: a row of zeros fires too
BIASES[0] = -1000.0


def encode(states: Tensor) -> Tensor:
    # Values of few digits: ties occur.
    return ((states @ ENCODER + BIASES).relu() * 8).round() / 8


def texts() -> Iterator[tuple[int, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    for text in range(TEXTS):
        yield text, torch.randn(3 + text % 11, D_IN, generator=generator)


def tallied(piece: int, block: int) -> dict[str, np.ndarray]:
    """The whole stream, `piece` tokens at a time."""
    tally = Tally(encode, D_IN, D_SAE)
    tally.block_size = block
    for text, states in texts():
        for first in range(0, len(states), piece):
            tally.add(states[first : first + piece], text, first)
    return tally.arrays()


@pytest.mark.parametrize("block", [5, 64, 4096])
def test_counts_are_those_of_plain_python(block: int) -> None:
    found = tallied(100, block)
    seen = defaultdict(list)
    for text, states in texts():
        for position, row in enumerate(encode(states).tolist()):
            for feature, value in enumerate(row):
                if value:
                    seen[feature].append((value, text, position))
    assert not seen[0]
    for feature in range(D_SAE):
        values = [value for value, _, _ in seen[feature]]
        assert found["fired"][feature] == len(values)
        assert found["total"][feature] == pytest.approx(sum(values))
        assert found["largest"][feature] == max(values, default=0)
        assert found["histogram"][feature].sum() == len(values)
        best: dict[int, tuple[float, int, int]] = {}
        for value, text, position in seen[feature]:
            if text not in best or value > best[text][0]:
                best[text] = (value, text, position)
        top = sorted(best.values(), key=lambda one: (-one[0], one[1]))[:TOP]
        assert rows(found, "top", feature) == top
        drawn = sorted(seen[feature], key=lambda one: chance(feature, one))[:SAMPLE]
        assert rows(found, "sample", feature) == drawn


def rows(found: dict[str, np.ndarray], name: str, feature: int) -> list[tuple[float, int, int]]:
    columns = [found[f"{name}_{key}"][feature].tolist() for key in ("value", "text", "position")]
    return [row for row in zip(*columns, strict=True) if row[1] >= 0]


def chance(feature: int, one: tuple[float, int, int]) -> float:
    return float(chance_of(*(np.array([n]) for n in (feature, one[1], one[2])))[0])


@pytest.mark.parametrize("piece", [1, 2, 7])
def test_how_the_stream_is_cut_changes_no_bit(piece: int) -> None:
    expected, found = tallied(1000, 32), tallied(piece, 32)
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        assert array.tobytes() == found[name].tobytes(), name


@pytest.mark.parametrize("stop", [1, 40, 89])
def test_going_on_from_a_state_changes_no_bit(stop: int) -> None:
    first, second = Tally(encode, D_IN, D_SAE), Tally(encode, D_IN, D_SAE)
    for text, states in texts():
        if text == stop:
            second.restore({name: one.copy() for name, one in first.state().items()})
        (first if text < stop else second).add(states, text)
    whole = tallied(1000, first.block_size)
    for name, array in second.arrays().items():
        assert array.tobytes() == whole[name].tobytes(), name


def test_a_sample_is_drawn_evenly() -> None:
    drawn = chance_of(np.arange(100_000), np.full(100_000, 3))
    counts = np.histogram(drawn, bins=10, range=(0, 1))[0]
    assert abs(counts - 10_000).max() < 400
    assert len(np.unique(drawn)) == len(drawn)


@pytest.mark.parametrize("value", [1e-9, 2.0**-8, 0.3, 1.0, 1.99, 200.0, 2.0**8, 1e9])
def test_a_value_lies_in_its_bin(value: float) -> None:
    place = int(bin_of(np.array([value]))[0])
    low, high = edges_from(place, place)
    assert low <= value < high


def test_quantiles_are_within_a_bin_of_the_exact_ones() -> None:
    values = np.exp(np.random.default_rng(0).normal(size=5000))
    histogram = np.bincount(bin_of(values), minlength=BINS)
    for share, found in quantiles(histogram, values.max()).items():
        assert found == pytest.approx(np.quantile(values, float(share)), rel=0.1)
