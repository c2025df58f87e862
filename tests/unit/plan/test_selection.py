"""Selections are functions of (position, prompt length, token id), and of nothing else."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from float64_reference import selected
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import SpecError
from steer.plan.selection import FOREVER, Ramp, TokenReader, resolve
from steer.spec import Where

LENGTH = 24

ranges = st.lists(
    st.tuples(st.integers(-12, 30), st.one_of(st.none(), st.integers(-12, 40))).filter(
        lambda r: r[1] is None or (r[0] < 0) != (r[1] < 0) or r[0] < r[1]
    ),
    min_size=1,
    max_size=3,
)


def fields(**more: Any) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries(
        {},
        optional={
            "phases": st.lists(st.sampled_from(["prompt", "generation"]), min_size=1, max_size=2),
            "positions": ranges,
            "tokens": st.lists(st.integers(0, 4), min_size=1, max_size=3),
            **more,
        },
    )


wheres = fields(**{"except": fields()}).map(Where.model_validate)
everies = st.fixed_dictionaries(
    {}, optional={"nth": st.integers(1, 4), "first": st.integers(1, 12)}
).filter(bool)
ramps = st.none() | st.dictionaries(
    st.integers(0, 20), st.sampled_from([0.0, 1e-44, 1e-31, 0.25, 0.7, 1.0]), min_size=1, max_size=5
).map(lambda points: Ramp(tuple(sorted(points.items()))))
prompt_lengths = st.integers(1, 20)
tokens = st.lists(st.integers(0, 5), min_size=LENGTH, max_size=LENGTH)


@given(where=wheres, prompt_length=prompt_lengths, ids=tokens)
def test_the_mask_is_what_the_spec_says_of_each_token(
    where: Where, prompt_length: int, ids: list[int]
) -> None:
    mask = resolve(where).mask(np.arange(LENGTH), prompt_length, np.array(ids))
    assert mask.tolist() == [selected(where, n, prompt_length, ids[n]) for n in range(LENGTH)]


@given(
    where=wheres,
    prompt_length=prompt_lengths,
    ids=tokens,
    cuts=st.lists(st.integers(0, LENGTH), max_size=6),
)
def test_any_chunking_gives_the_mask_of_the_whole(
    where: Where, prompt_length: int, ids: list[int], cuts: list[int]
) -> None:
    selection, places, chosen = resolve(where), np.arange(LENGTH), np.array(ids)
    whole = selection.mask(places, prompt_length, chosen)
    parts = [
        selection.mask(places[a:b], prompt_length, chosen[a:b])
        for a, b in zip([0, *sorted(cuts)], [*sorted(cuts), LENGTH], strict=True)
    ]
    assert np.array_equal(np.concatenate(parts), whole)


@given(where=wheres, prompt_length=prompt_lengths, ids=tokens)
def test_from_steady_on_the_mask_is_constant(
    where: Where, prompt_length: int, ids: list[int]
) -> None:
    selection = resolve(where)
    steady = None if selection.reads_tokens else selection.fixed_from(prompt_length)
    mask = selection.mask(np.arange(LENGTH), prompt_length, np.array(ids))
    if steady is None:
        assert selection.reads_tokens
    else:
        assert len(set(mask[steady:].tolist())) <= 1


@given(where=wheres, prompt_length=prompt_lengths, ids=tokens)
def test_from_settled_on_the_mask_is_a_function_of_the_token(
    where: Where, prompt_length: int, ids: list[int]
) -> None:
    selection = resolve(where)
    resolved = selection.fixed_from(prompt_length)
    mask = selection.mask(np.arange(LENGTH), prompt_length, np.array(ids))
    seen: dict[int, bool] = {}
    for token, chosen in list(zip(ids, mask.tolist(), strict=True))[resolved:]:
        assert seen.setdefault(token, chosen) == chosen


@given(
    where=fields(every=everies, **{"except": fields(every=everies)}).map(Where.model_validate),
    ramp=ramps,
    prompt_length=prompt_lengths,
    ids=tokens,
    anchored=st.booleans(),
)
def test_between_two_edges_the_mask_is_a_function_of_the_token(
    where: Where, ramp: Ramp | None, prompt_length: int, ids: list[int], anchored: bool
) -> None:
    selection = replace(resolve(where), ramp=ramp)
    if anchored:
        selection, prompt_length = selection.anchored(prompt_length), LENGTH
    mask = selection.mask(np.arange(LENGTH), prompt_length, np.array(ids)).tolist()
    for place in range(LENGTH):
        until = selection.fixed_until(place, prompt_length)
        assert until > place
        chosen: dict[int, bool] = {}
        for token, one in list(zip(ids, mask, strict=True))[place:until]:
            assert selection.varies or chosen.setdefault(token, one) == one
    assert selection.fixed_until(selection.fixed_from(prompt_length), prompt_length) == FOREVER


@given(ramp=ramps.filter(bool), places=st.lists(st.integers(-4, 40), min_size=1, max_size=20))
def test_a_ramp_is_lines_from_point_to_point(ramp: Ramp, places: list[int]) -> None:
    tokens, factors = zip(*ramp.points, strict=True)
    found = ramp.factors(np.array(places) + 9, 9)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.interp(places, tokens, factors), rtol=2e-7, atol=1e-29)
    at = dict(ramp.points)
    for place, factor in zip(places, found.tolist(), strict=True):
        assert 0 <= factor <= 1
        if place in at and at[place] > 1e-30:
            assert factor == np.float32(at[place])


@given(where=wheres, ids=tokens, prompt_length=prompt_lengths)
def test_first_is_never_later_than_the_truth(
    where: Where, ids: list[int], prompt_length: int
) -> None:
    """What comes before `first` may be shared with other requests, so it may err to early only."""
    selection = resolve(where)
    hits = np.flatnonzero(selection.mask(np.arange(LENGTH), prompt_length, np.array(ids)))
    first = selection.first(ids[:prompt_length], LENGTH)
    if len(hits):
        assert first is not None
        assert first <= hits[0]
    if first is not None and not selection.reads_tokens:
        assert first == hits[0]


@pytest.mark.parametrize(
    ("ranges", "chosen"),
    [
        ([[-1, None]], [5, 6, 7, 8]),
        ([[-3, -1]], [3, 4]),
        ([[0, -4]], [0, 1]),
        ([[-100, 2]], [0, 1]),
        ([[7, None]], [7, 8]),
        ([[0, 1], [4, 6]], [0, 4, 5]),
        ([[5, -3]], []),
    ],
)
def test_negative_bounds_count_from_the_prompts_end(
    ranges: list[list[int | None]], chosen: list[int]
) -> None:
    selection = resolve(Where.model_validate({"positions": ranges}))
    mask = selection.mask(np.arange(9), 6, np.zeros(9, dtype=np.int64))
    assert np.flatnonzero(mask).tolist() == chosen


def test_a_token_string_is_one_token_of_the_model() -> None:
    where = Where.model_validate({"tokens": [7, "yes"], "except": {"tokens": ["no"]}})
    ids = {"yes": [11], "no": [12]}
    selection = resolve(where, TokenReader(ids.__getitem__))
    assert selection.tokens == {7, 11}
    assert selection.excluded is not None
    assert selection.excluded.tokens == {12}


@pytest.mark.parametrize("ids", [[], [4, 5]])
def test_a_string_of_no_or_several_tokens_is_refused(ids: list[int]) -> None:
    where = Where.model_validate({"except": {"tokens": [3, "two words"]}})
    with pytest.raises(SpecError) as caught:
        resolve(where, TokenReader(lambda text: ids), param="/where")
    assert caught.value.code == "not_one_token"
    assert caught.value.param == "/where/except/tokens/1"


def test_a_token_string_needs_a_tokenizer() -> None:
    with pytest.raises(SpecError, match="no tokenizer") as caught:
        resolve(Where(tokens=("yes",)), param="/where")
    assert caught.value.param == "/where/tokens/0"


@pytest.mark.parametrize(
    ("where", "param"),
    [
        ({"tokens": [3, 50]}, "/where/tokens/1"),
        ({"except": {"tokens": [50]}}, "/where/except/tokens/0"),
        ({"after": ["a", [1, 50]]}, "/where/after/1/1"),
        ({"before": [[50]]}, "/where/before/0/0"),
        ({"between": [[[1], [50]]]}, "/where/between/0/1/0"),
        ({"outside": [[[50], None]]}, "/where/outside/0/0/0"),
    ],
)
def test_an_id_that_no_token_has_is_refused(where: dict[str, Any], param: str) -> None:
    reader = TokenReader(vocabulary=lambda: [b"a"] * 50, vocab_size=50)
    with pytest.raises(SpecError, match="not in the vocabulary of 50") as caught:
        resolve(Where.model_validate(where), reader, param="/where")
    assert (caught.value.code, caught.value.param) == ("unknown_token", param)
