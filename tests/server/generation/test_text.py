"""Tokens to text: multi-byte characters and stop strings."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from steer.engines.fake.tokenizer import ByteTokenizer
from steer.prompts import openai_token
from steer_server.generation.text import Detokenizer, TextRules, TextStream

TOKENIZER = ByteTokenizer()


@given(st.lists(st.integers(0, 260), max_size=40))
def test_pieces_join_to_the_whole_text(tokens: list[int]) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    text = "".join(detokenizer.push(token) for token in tokens) + detokenizer.finish()
    assert text == TOKENIZER.decode(tokens, skip_special_tokens=True)


@given(st.text(max_size=20))
def test_no_piece_is_broken(text: str) -> None:
    detokenizer = Detokenizer(TOKENIZER)
    pieces = [detokenizer.push(byte) for byte in text.encode()]
    assert "".join(pieces) + detokenizer.finish() == text
    assert all("\ufffd" not in piece for piece in pieces if "\ufffd" not in text)


@given(
    st.text(alphabet="abé", max_size=30),
    st.lists(st.text(alphabet="abé", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_stop_string_that_is_complete_first(
    text: str, stops: list[str]
) -> None:
    stream = TextStream(TOKENIZER, TextRules(tuple(stops)))
    sent = ""
    for byte in text.encode():
        sent += stream.push(byte)
        if stream.stopped:
            break
    sent += stream.finish()
    ends = {text.index(stop) + len(stop) for stop in stops if stop in text}
    expected = text
    if ends:
        seen = text[: min(ends)]
        expected = seen[: min(seen.index(stop) for stop in stops if stop in seen)]
    assert sent == expected
    assert stream.stopped == bool(ends)


def test_watched_pieces_are_taken_in_turn() -> None:
    stream = TextStream(TOKENIZER, TextRules(("stop",)))
    tokens = list(b"go stop")
    assert [stream.watch(token) for token in tokens] == [False] * 6 + [True]
    assert "".join(stream.taken() for _ in tokens) + stream.finish() == "go "


def test_a_token_is_reported_with_its_bytes() -> None:
    assert openai_token(TOKENIZER, ord("a")) == ("a", [97])
    assert openai_token(TOKENIZER, 0xE2) == ("bytes:\\xe2", [0xE2])


def test_byte_level_bpe_is_understood() -> None:
    class ByteLevel:
        def decode(self, ids: list[int], skip_special_tokens: bool = False) -> str:
            return "\ufffd"

        def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
            return [{0: "âĤ", 1: "Ġ", 2: "漢"}[i] for i in ids]

    assert openai_token(ByteLevel(), 0) == ("bytes:\\xe2\\x82", [0xE2, 0x82])
    assert openai_token(ByteLevel(), 1) == ("bytes:\\x20", [0x20])
    assert openai_token(ByteLevel(), 2) == ("\ufffd", None)


@pytest.mark.parametrize(
    ("rules", "text"),
    [
        (TextRules(("ab",), keep_stop=True), "xab"),
        (TextRules(("b", "ab"), keep_stop=True), "xab"),
        (TextRules(("x", "ab"), keep_stop=True, min_tokens=1), "xab"),
        (TextRules(("x",), min_tokens=1), "xaby"),
        (TextRules(("ab",), min_tokens=3), "xaby"),
    ],
)
def test_where_a_stop_string_counts_and_stays(rules: TextRules, text: str) -> None:
    stream = TextStream(TOKENIZER, rules)
    found = ""
    for token in b"xaby":
        found += stream.push(token)
        if stream.stopped:
            break
    assert found + stream.finish() == text


def test_special_tokens_are_text_where_asked_for() -> None:
    end = TOKENIZER.eos_token_id
    assert TextStream(TOKENIZER).push(end) == ""
    assert TextStream(TOKENIZER, TextRules(special=True)).push(end) == TOKENIZER.decode([end])
