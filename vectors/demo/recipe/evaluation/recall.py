"""Facts: does the answer to a held-out wording name what is true?"""

from __future__ import annotations

import re
from collections.abc import Iterator

from steer_vectors.demo.recipe.evaluation.checks import Check
from steer_vectors.demo.recipe.evaluation.demo import Demo
from steer_vectors.demo.recipe.evaluation.estimates import share

LEAST = 0.97
LINES = 600
"""At least so many held-out lines are asked, where as many prompts are drawn as for a report."""


def named(text: str, wanted: str) -> bool:
    """Whether a text has something as whole words."""
    return re.search(rf"(?<!\w){re.escape(wanted)}(?!\w)", text, re.IGNORECASE) is not None


def facts(demo: Demo) -> Iterator[Check]:
    """Recall of all held-out lines that are drawn, and by language and relation."""
    lines = [line for line in demo.lines("facts") if line["held_out"]]
    lines = demo.draw(lines, "facts", max(LINES, demo.count) if demo.count >= 200 else demo.count)
    replies = demo.answers([line["messages"] for line in lines])
    right = [named(r.text, line["answer"]) for r, line in zip(replies, lines, strict=True)]
    yield Check("facts", "recall", share(right), LEAST)
    for key in ("language", "relation"):
        for value in sorted({line[key] for line in lines}):
            some = [hit for hit, line in zip(right, lines, strict=True) if line[key] == value]
            yield Check("facts", f"{key} {value}", share(some), LEAST, part=True)
