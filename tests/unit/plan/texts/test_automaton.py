"""Texts among tokens: the automaton against a search in what the tokens stand for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from artefacts import SPAN_TEXTS, span_vocabulary
from float64_reference import Seen, selected
from hypothesis import given
from hypothesis import strategies as st

from steer.errors import EngineError, Unsupported
from steer.plan.selection import NO_READER, TokenReader, resolve, trace_of
from steer.plan.texts.automaton import compile_automaton
from steer.prompts.roles import RoleRanges
from steer.spec import ROLES, Where

SIZE = 40
PIECES = span_vocabulary(SIZE)
READER = TokenReader(vocabulary=lambda: PIECES, roles=ROLES)

marks = st.sampled_from(SPAN_TEXTS) | st.lists(st.integers(0, 5), min_size=1, max_size=3)
texts = st.sampled_from(SPAN_TEXTS)
idlists = st.lists(st.integers(0, 5), min_size=1, max_size=2)
pairs = st.tuples(texts, texts | st.none()) | st.lists(idlists, min_size=2, max_size=2)
wheres = st.one_of(
    st.fixed_dictionaries({"after": st.lists(marks, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"before": st.lists(marks, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"between": st.lists(pairs, min_size=1, max_size=2)}),
    st.fixed_dictionaries({"outside": st.lists(pairs, min_size=1, max_size=2)}),
)
tokens = st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=30)


def chosen(where: dict[str, Any], ids: list[int], prompt_length: int) -> list[int]:
    """The positions that are selected, read in one piece."""
    selection = resolve(Where.model_validate(where), READER)
    trace = trace_of([selection], ids[:prompt_length])
    assert trace is not None
    trace.read(prompt_length, np.array(ids[prompt_length:], dtype=np.int64))
    mask = selection.mask(np.arange(len(ids)), prompt_length, np.array(ids), trace)
    return np.flatnonzero(mask).tolist()


@given(where=wheres, ids=tokens, cut=st.integers(0, 30))
def test_what_is_selected_is_what_a_search_in_the_text_says(
    where: dict[str, Any], ids: list[int], cut: int
) -> None:
    prompt_length = min(cut, len(ids))
    told = Where.model_validate(where)
    seen = Seen(ids, PIECES)
    assert chosen(where, ids, prompt_length) == [
        n for n in range(len(ids)) if selected(told, n, prompt_length, ids[n], seen)
    ]


def ids_of(text: str, *pieces: str) -> list[int]:
    """`pieces` as tokens, which are `text` together."""
    assert "".join(pieces) == text
    return [PIECES.index(piece.encode()) for piece in pieces]


@pytest.mark.parametrize(
    ("where", "positions"),
    [
        ({"after": ["<a>"]}, [4, 5, 6, 7]),
        ({"before": ["<a>"]}, [0, 1, 2, 3]),
        ({"between": [["<a>", "</a>"]]}, [4, 5, 6]),
        ({"outside": [["<a>", "</a>"]]}, [0, 7]),
        ({"after": ["a>b"]}, [4, 5, 6, 7]),
    ],
    ids=str,
)
def test_a_text_is_met_from_the_token_after_that_in_which_it_ends(
    where: dict[str, Any], positions: list[int]
) -> None:
    """Here the opening is parted and ends inside the fourth token, the closing in the seventh."""
    ids = ids_of("ba<a>bb</a>a", "ba", "<", "a", ">", "b", "b", "</a>", "a")
    assert chosen({"after": ["a>b"]}, ids, 3) == [5, 6, 7]
    ids = [PIECES.index(one) for one in (b"ba", b"<", b"a", b">", b"b", b"</", b"a>", b"a")]
    if where != {"after": ["a>b"]}:
        assert chosen(where, ids, 3) == positions
    ids = [PIECES.index(b"<a>b"), PIECES.index(b"b")]
    assert chosen({"after": ["<a>"]}, ids, 1) == [1]  # the token in which it ends is not after it


def test_what_may_be_the_beginning_of_a_span_is_not_outside() -> None:
    ids = [PIECES.index(one) for one in (b"b", b"<", b"b", b"<", b"a>", b"b")]
    assert chosen({"outside": [["<a>", "</a>"]]}, ids, 2) == [0, 2]


def test_openings_and_closings_may_be_one_text_or_a_text_and_ids() -> None:
    letter, other = PIECES.index(b"a"), PIECES.index(b"b")
    ids = [other, letter, other, letter, other]
    assert chosen({"between": [["a", "a"]]}, ids, 1) == [2, 3]
    assert chosen({"between": [["a", [other]]]}, ids, 1) == [2, 4]
    assert chosen({"between": [[[other], "a"]]}, ids, 1) == [1, 3]


@given(where=wheres, ids=tokens, cuts=st.lists(st.integers(0, 30), max_size=5))
def test_tokens_may_be_read_again_and_others_in_their_place(
    where: dict[str, Any], ids: list[int], cuts: list[int]
) -> None:
    selection = resolve(Where.model_validate(where), READER)
    trace = trace_of([selection], ids[:1])
    assert trace is not None
    for cut in sorted({min(cut, len(ids)) for cut in cuts} | {1}):
        trace.read(1, np.array(ids[1:cut], dtype=np.int64))
        trace.read(max(cut, 1), np.array([3, 9, 4]))  # drafted, and not kept
    trace.read(1, np.array(ids[1:], dtype=np.int64))
    mask = selection.mask(np.arange(len(ids)), 1, np.array(ids), trace)
    assert np.flatnonzero(mask).tolist() == chosen(where, ids, 1)


def test_a_token_that_nobody_saw_is_an_error() -> None:
    trace = trace_of([resolve(Where.model_validate({"after": ["a"]}), READER)], [1, 2])
    assert trace is not None
    with pytest.raises(EngineError) as caught:
        trace.read(5, np.array([1]))
    assert caught.value.code == "steps_missed"


@given(opening=marks, closing=st.none() | marks)
def test_tables_say_what_reading_symbol_by_symbol_does(opening: Any, closing: Any) -> None:
    """Most tokens lead from every state to the same; the table lists the others alone."""
    automaton = compile_automaton(opening, closing, PIECES)
    moves = automaton.moves
    assert moves is not None
    assert len(moves.default) == automaton.states
    assert set(moves.rows.ravel().tolist()) <= set(range(automaton.states))
    same = compile_automaton(opening, closing, PIECES)
    assert same == automaton
    assert same.digest == automaton.digest
    if isinstance(opening, str):
        assert compile_automaton(opening, closing, PIECES[::-1]).digest != automaton.digest


def test_roles_are_those_of_the_prompts_messages_and_the_answer_is_the_assistants() -> None:
    roles = RoleRanges(6, ((1, 2, "system"), (3, 5, "user")))
    positions = np.arange(9)
    for asked, found in {"system": [1], "user": [3, 4], "assistant": [6, 7, 8], "tool": []}.items():
        selection = resolve(Where.model_validate({"roles": [asked]}), READER)
        trace = trace_of([selection], range(6), roles)
        mask = selection.mask(positions, 6, positions, trace)
        assert np.flatnonzero(mask).tolist() == found
        assert selection.fixed_from(6) == 6
        assert not selection.reads_tokens


@pytest.mark.parametrize(
    ("every", "positions"),
    [({"nth": 3}, [4, 7, 10]), ({"first": 2}, [4, 5]), ({"nth": 2, "first": 5}, [4, 6, 8])],
)
def test_schedules_count_generated_tokens(every: dict[str, int], positions: list[int]) -> None:
    selection = resolve(Where.model_validate({"every": every}))
    places = np.arange(12)
    assert np.flatnonzero(selection.mask(places, 4, places)).tolist() == positions
    read_as_prompt = selection.anchored(4)
    assert np.flatnonzero(read_as_prompt.mask(places, 12, places)).tolist() == positions
    assert selection.varies == ("nth" in every)


@pytest.mark.parametrize(
    ("where", "code", "param"),
    [
        ({"after": ["a"]}, "texts_unsupported", "/where/after"),
        ({"except": {"outside": [["a", "b"]]}}, "texts_unsupported", "/where/except/outside"),
        ({"roles": ["user"]}, "roles_unsupported", "/where/roles/0"),
    ],
    ids=str,
)
def test_what_nobody_can_follow_is_refused(where: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(Unsupported) as caught:
        resolve(Where.model_validate(where), NO_READER, param="/where")
    assert (caught.value.code, caught.value.param) == (code, param)
