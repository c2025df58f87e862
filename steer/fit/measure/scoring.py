"""Scores of generated texts: does it have the attribute, and is it still sound?"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from steer.engines.base import Engine
from steer.errors import SteerError


@dataclass(frozen=True)
class Score:
    """`value` from 0 (attribute absent) to 1; `valid` is whether the text is sound, where the
    scorer can tell. `judged` is false where no judgement could be had: then the value is none."""

    value: float
    valid: bool | None = None
    judged: bool = True


Scorer: TypeAlias = Callable[[str], Score]
"""Scores a text by itself."""


@runtime_checkable
class AnswerScorer(Protocol):
    """Scores many answers at once, with the model that is served at hand."""

    def score(
        self,
        engine: Engine,
        prompts: Sequence[Sequence[int]],
        answers: Sequence[Sequence[int]],
        texts: Sequence[str],
    ) -> list[Score]:
        """One score for each answer: its prompt and itself as tokens, and its text."""


def regex_scorer(pattern: str) -> Scorer:
    """1 where the pattern occurs, ignoring case. Raises `SteerError` for a bad pattern."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise SteerError(
            f"{pattern!r} is not a regular expression: {error}", code="invalid_scorer"
        ) from error
    return lambda text: Score(float(compiled.search(text) is not None))


def words_scorer(words: Iterable[str]) -> Scorer:
    """1 where one of the words occurs as a whole word, ignoring case."""
    kept = [re.escape(word.strip()) for word in words if word.strip()]
    if not kept:
        raise SteerError("the word list is empty", code="invalid_scorer")
    return regex_scorer(rf"(?<!\w)(?:{'|'.join(kept)})(?!\w)")


def function_scorer(path: str) -> Scorer:
    """The function `module:name`; it takes a text and returns a `Score`, a bool or a number."""
    module_name, _, name = path.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module_name), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise SteerError(
            f"{path!r} cannot be imported: {error}; write module:function", code="invalid_scorer"
        ) from error
    if not callable(found):
        raise SteerError(f"{path!r} is not a function", code="invalid_scorer")

    def score(text: str) -> Score:
        result = found(text)
        return result if isinstance(result, Score) else Score(float(result))

    return score
