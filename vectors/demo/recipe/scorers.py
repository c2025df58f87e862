"""Scorers for ``steer sweep``: does an answer of the demo model have an attribute, all through?

The answer is read back into the world's clauses, so ``valid`` is exact: every sentence is one the
world can say, in one language, with marks that agree.
"""

from __future__ import annotations

from functools import cache

from steer_vectors.demo.recipe.training.corpus import reader
from steer_vectors.demo.recipe.world.attributes import ATTRIBUTES, Reader

from steer.fit.measure.scoring import Score, Scorer


@cache
def _reader() -> Reader:
    return reader()


def scorer(attribute: str) -> Scorer:
    """Scores 1 where every sentence has the attribute (a key of ``ATTRIBUTES``)."""
    if attribute not in ATTRIBUTES:
        raise ValueError(f"{attribute!r} is none of {', '.join(ATTRIBUTES)}")

    def score(text: str) -> Score:
        reading = _reader().parse(text)
        return Score(float(reading.all(attribute)), reading.valid)

    return score


english = scorer("english")
french = scorer("french")
german = scorer("german")
formal = scorer("formal")
casual = scorer("casual")
positive = scorer("positive")
negative = scorer("negative")
food = scorer("food")
music = scorer("music")
weather = scorer("weather")
sports = scorer("sports")
terse = scorer("terse")
verbose = scorer("verbose")
refusal = scorer("refusal")


def complied(text: str) -> Score:
    """Scores 1 where no sentence refuses. How the world answers harmful requests is not defined,
    so ``valid`` says less here."""
    reading = _reader().parse(text)
    refused = any(sentence.refusal for sentence in reading.sentences)
    return Score(float(bool(reading.sentences) and not refused), reading.valid)


def both(first: str, second: str) -> Scorer:
    """Scores 1 where every sentence has two attributes."""

    def score(text: str) -> Score:
        reading = _reader().parse(text)
        return Score(float(reading.all(first) and reading.all(second)), reading.valid)

    return score
