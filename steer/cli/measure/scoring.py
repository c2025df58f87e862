"""What counts, as every command spells it."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from steer.artefacts.library import Library
    from steer.fit.measure.scoring import AnswerScorer, Scorer


def scorer_of(text: str, library: Library) -> Scorer | AnswerScorer:
    """The scorer that `text` spells; probes are vectors of `library`. Raises `SteerError`."""
    from steer.fit.measure.scorers import parse_scorer

    kind, _, attribute = text.partition(":")
    if kind == "demo":
        text = f"python:steer_vectors.demo.recipe.scorers:{attribute}"
    return parse_scorer(text, library.vector, judge_key=os.environ.get("OPENAI_API_KEY") or "none")
