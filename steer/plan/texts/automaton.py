"""Texts among tokens: an automaton that reads one token after the other.

A text is looked for in the bytes that tokens stand for, however it is parted into tokens, and token
ids among the ids. What a token does is worked out once for the whole vocabulary, where the plan is
compiled, so that whoever reads the tokens of a request needs no tokenizer: a front end, an engine
core and each of its workers come to the same states.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from steer.spec import Mark

Ints = NDArray[np.int64]


@dataclass(frozen=True)
class Moves:
    """What tokens do, S states: `tokens` `[n]` go by the row `row_of` `[n]` of `rows` `[r, S]`,
    which says the state after the token for each before it; all others by `default` `[S]`."""

    tokens: Ints
    row_of: Ints
    rows: Ints
    default: Ints

    @cached_property
    def _by_token(self) -> dict[int, list[int]]:
        rows = self.rows.tolist()
        pairs = zip(self.tokens.tolist(), self.row_of.tolist(), strict=True)
        return {token: rows[row] for token, row in pairs}

    @cached_property
    def _otherwise(self) -> list[int]:
        return [int(state) for state in self.default]

    def after(self, state: int, token: int) -> int:
        """The state after `token`."""
        return self._by_token.get(token, self._otherwise)[state]

    @property
    def digest(self) -> str:
        """Tells tables apart: the same marks are other tokens in another vocabulary."""
        parts = (self.tokens, self.row_of, self.rows, self.default)
        data = b"".join(np.ascontiguousarray(part, dtype="<i8").tobytes() for part in parts)
        return hashlib.sha256(data).hexdigest()[:16]


@dataclass(frozen=True)
class TokenAutomaton:
    """Looks for `opening`, then for `closing`, and so on; without one it stays where it is.

    In state 0 nothing of an opening has been read, in the states up to `inside` a part of one; from
    `inside` on one has been met and its closing has not. `moves` are None where the automaton is
    only named, by `digest`: as in a ticket.
    """

    opening: Mark
    closing: Mark | None
    digest: str
    moves: Moves | None = field(default=None, compare=False, repr=False)

    @property
    def inside(self) -> int:
        """The first state in which an opening has been met."""
        return len(_symbols(self.opening))

    @property
    def states(self) -> int:
        return self.inside + (1 if self.closing is None else len(_symbols(self.closing)))

    def after(self, state: int, token: int) -> int:
        """The state after `token`."""
        if self.moves is None:
            raise AssertionError("an automaton that is only named reads no tokens")
        return self.moves.after(state, token)


def compile_automaton(
    opening: Mark, closing: Mark | None, vocabulary: Sequence[bytes]
) -> TokenAutomaton:
    """The automaton of these marks; `vocabulary` holds the bytes that each token stands for."""
    moves = _Compiler(opening, closing).moves(vocabulary)
    return TokenAutomaton(opening, closing, moves.digest, moves)


def default_moves(opening: Mark, closing: Mark | None) -> Ints:
    """What most tokens do: nothing of what is looked for is left behind them."""
    inside = len(_symbols(opening))
    rest = 1 if closing is None else len(_symbols(closing))
    return np.repeat(np.array([0, inside], dtype=np.int64), [inside, rest])


def _symbols(mark: Mark) -> Sequence[int]:
    return mark.encode() if isinstance(mark, str) else mark


class _MarkSearch:
    """Knuth, Morris and Pratt's search for one mark: the state is how much of it was read last."""

    def __init__(self, mark: Mark, first: int, met: int) -> None:
        """Its states begin at the automaton's state `first`; it leads to `met` where it ends."""
        self.in_bytes = isinstance(mark, str)
        self.symbols, self.first, self._met = _symbols(mark), first, met
        self._failure = [0]
        for symbol in self.symbols[1:]:
            self._failure.append(self._advanced(self._failure[-1], symbol))

    def after(self, state: int, symbol: int) -> int:
        """The automaton's state after `symbol`, from one of this search's."""
        reached = self._advanced(state - self.first, symbol)
        return self._met if reached == len(self.symbols) else self.first + reached

    def _advanced(self, length: int, symbol: int) -> int:
        while length and (length == len(self.symbols) or self.symbols[length] != symbol):
            length = self._failure[length - 1]
        return length + (self.symbols[length] == symbol)


class _Compiler:
    """Runs every token through the two searches, symbol by symbol: its bytes, then its id."""

    def __init__(self, opening: Mark, closing: Mark | None) -> None:
        inside = len(_symbols(opening))
        self._searches = [_MarkSearch(opening, 0, inside)]
        if closing is not None:
            self._searches.append(_MarkSearch(closing, inside, 0))
        self._default = default_moves(opening, closing)
        self._search_of: list[_MarkSearch | None] = [
            search for search in self._searches for _ in search.symbols
        ]
        if closing is None:
            self._search_of.append(None)  # met once and for all
        self._by_first_byte = [self._followed(byte) for byte in range(256)]

    def moves(self, vocabulary: Sequence[bytes]) -> Moves:
        default = self._default.tolist()
        rows: dict[tuple[int, ...], int] = {}
        tokens, row_of = [], []
        for token, text in enumerate(vocabulary):
            row = self._row(token, text, default)
            if row is not None:
                tokens.append(token)
                row_of.append(rows.setdefault(row, len(rows)))
        table = np.array(list(rows), dtype=np.int64).reshape(len(rows), len(default))
        return Moves(
            np.array(tokens, dtype=np.int64), np.array(row_of, dtype=np.int64), table, self._default
        )

    def _row(self, token: int, text: bytes, default: list[int]) -> tuple[int, ...] | None:
        """The state after the token for each before it; None where that is the default."""
        row = list(default)
        for search in self._searches:
            states = range(search.first, search.first + len(search.symbols))
            if not search.in_bytes:
                if token in search.symbols:
                    for state in states:
                        row[state] = self._after(state, token, text)
            elif not text:
                for state in states:
                    row[state] = self._after(state, token, text)
            else:
                if search.symbols[0] in text:
                    row[states.start : states.stop] = [
                        self._after(search.first, token, text)
                    ] * len(states)
                for state in self._by_first_byte[text[0]]:
                    if state in states:
                        row[state] = self._after(state, token, text)
        return None if row == default else tuple(row)

    def _after(self, state: int, token: int, text: bytes) -> int:
        for byte in text:
            search = self._search_of[state]
            if search is not None and search.in_bytes:
                state = search.after(state, byte)
        search = self._search_of[state]
        if search is not None and not search.in_bytes:
            state = search.after(state, token)
        return state

    def _followed(self, byte: int) -> list[int]:
        """The states from which `byte` leads elsewhere than from where nothing was read."""
        return [
            search.first + state
            for search in self._searches
            if search.in_bytes
            for state in range(1, len(search.symbols))
            if search.after(search.first + state, byte) != search.after(search.first, byte)
        ]
