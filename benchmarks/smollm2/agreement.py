"""How far answers are those of the reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

Answers = Sequence[list[int] | str]
"""One for each chat: its tokens, or their text where a server gives no more."""


@dataclass(frozen=True)
class Agreement:
    """Tokens before the first that differs, of how many there are; whole answers likewise."""

    tokens: int
    of_tokens: int
    answers: int
    of_answers: int

    @property
    def share(self) -> float:
        return self.tokens / self.of_tokens

    def __str__(self) -> str:
        return (
            f"{self.tokens:,} of {self.of_tokens:,} ({self.answers} of {self.of_answers} answers)"
        )


def agreement(
    expected: Sequence[Sequence[int]],
    answers: Answers,
    decode: Callable[[Sequence[int]], str],
    ends: Sequence[int],
) -> Agreement:
    """Answers are compared up to the reference's first end token, if it has one: some programs go
    on behind it, others choose another token in its place."""
    found, lengths = [], []
    for reference, answer in zip(expected, answers, strict=True):
        length = next((n for n, token in enumerate(reference) if token in ends), len(reference))
        lengths.append(length)
        found.append(_agreed(reference[:length], answer, decode))
    whole = sum(a == b for a, b in zip(found, lengths, strict=True))
    return Agreement(sum(found), sum(lengths), whole, len(lengths))


def _agreed(
    reference: Sequence[int], answer: list[int] | str, decode: Callable[[Sequence[int]], str]
) -> int:
    """The tokens of `reference` that `answer` begins with. Of a text, those whose own text it
    begins with: half of a character, which has none yet, counts with the token that ends it."""

    def begins(count: int) -> bool:
        if isinstance(answer, str):
            return answer.startswith(decode(reference[:count]))
        return answer[:count] == list(reference[:count])

    return next(count for count in range(len(reference), -1, -1) if begins(count))
