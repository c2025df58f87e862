"""The padded cache: rows hold what was put into them, and room follows what is in use."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

from steer.engines.transformers.rolling.cache import RollingCache

LAYERS, HEADS, WIDTH = 2, 1, 3


def _prompts(lengths: list[int], first: float) -> tuple[DynamicCache, torch.Tensor, list[list]]:
    """A right-aligned prompt cache with a number of its own in every cell that is no padding."""
    columns = max(lengths)
    mask = torch.zeros(len(lengths), columns, dtype=torch.long)
    numbers = torch.zeros(len(lengths), columns)
    told = []
    for row, length in enumerate(lengths):
        values = first + torch.arange(length) + 1000.0 * row
        mask[row, columns - length :] = 1
        numbers[row, columns - length :] = values
        told.append(values.tolist())
    cache = DynamicCache()
    states = numbers[:, None, :, None].repeat(1, HEADS, 1, WIDTH)
    for layer in range(LAYERS):
        cache.update(states + 0.25 * layer, -states - 0.25 * layer, layer)
    return cache, mask, told


def _decode(cache: RollingCache, first: float) -> list[float]:
    """One column for every row, as a decode step writes it."""
    cache.mask(1)
    numbers = first + torch.arange(cache.rows, dtype=torch.float32)
    states = numbers[:, None, None, None].repeat(1, HEADS, 1, WIDTH)
    for layer in range(LAYERS):
        cache.cache.update(states + 0.25 * layer, -states - 0.25 * layer, layer)
    cache.advance()
    return numbers.tolist()


def _room(cache: RollingCache) -> tuple[int, int]:
    """Rows and columns for which memory is held, in the layer that holds most."""
    shapes = [layer.keys.shape for layer in cache.cache.layers]
    return max(shape[0] for shape in shapes), max(shape[2] for shape in shapes)


def _check(cache: RollingCache, rows: list[list[float]]) -> None:
    assert cache.rows == len(rows)
    for layer, own in enumerate(cache.cache.layers if rows else ()):
        for row, numbers in enumerate(rows):
            seen = cache._mask[row, : cache.columns].bool()
            expected = torch.tensor(numbers)[None, :, None].expand(HEADS, -1, WIDTH) + 0.25 * layer
            torch.testing.assert_close(own.keys[row, :, : cache.columns][:, seen], expected)
            torch.testing.assert_close(own.values[row, :, : cache.columns][:, seen], -expected)


_LIVES = st.lists(
    st.one_of(
        st.tuples(st.just("adopt"), st.lists(st.integers(1, 300), min_size=1, max_size=12)),
        st.tuples(st.just("decode"), st.integers(1, 5)),
        st.tuples(st.just("remove"), st.integers(0, 50)),
    ),
    max_size=25,
)


@given(life=_LIVES)
@settings(max_examples=60, deadline=None)
def test_rows_hold_what_they_were_given_and_room_is_near_what_is_used(life):
    cache, rows, fresh = RollingCache(torch.device("cpu")), [], 0.0
    for what, argument in life:
        fresh += 1e4
        if what == "adopt":
            prompts, mask, told = _prompts(argument, fresh)
            cache.adopt(prompts, mask)
            rows += told
        elif what == "decode" and rows:
            for step in range(argument):
                for row, number in zip(rows, _decode(cache, fresh + 100 * step), strict=True):
                    row.append(number)
        elif what == "remove" and rows:
            gone = argument % len(rows)
            assert cache.remove(gone) == len(rows) - 1
            last = rows.pop()
            if gone < len(rows):
                rows[gone] = last
        cache.trim()
        _check(cache, rows)
        if cache.cache.layers:
            held, columns = _room(cache)
            assert held <= 4 * len(rows)
            assert columns <= max(4 * cache.columns, 64)


def test_a_long_prompt_that_left_is_not_paid_for_by_the_rows_that_follow():
    cache = RollingCache(torch.device("cpu"))
    cache.adopt(*_prompts([2000], 0.0)[:2])
    cache.remove(0)
    cache.trim()
    assert _room(cache) == (0, 0)

    cache.adopt(*_prompts([10] * 16, 0.0)[:2])

    rows, columns = _room(cache)
    assert rows * columns <= 16 * 64


def test_rows_that_come_while_it_runs_do_not_take_its_spare_room():
    cache = RollingCache(torch.device("cpu"))
    cache.adopt(*_prompts([1000], 0.0)[:2])
    _decode(cache, 5.0)
    assert _room(cache)[1] >= 1001
    cache.adopt(*_prompts([10] * 7, 1.0)[:2])
    long, short = _room(cache)
    cache.remove(0)
    cache.trim()

    assert (long, short) == (8, 2000)
    assert _room(cache) == (8, 64)
