"""Making a vector that was ended goes on where it was."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from steer.engines.journal import JournaledEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.make.making import make
from steer.fit.make.wish import Wish

PROMPTS = [f"{word} {n}" for n in range(8) for word in ("how", "why", "who")]
WISH = Wish("be loud!", "loud", opposite="be quiet", place="after", nulls=1, max_tokens=6, seed=1)


class Ended(Exception):
    """What a user's interrupt stands for."""


def test_it_goes_on_after_any_step_and_comes_to_the_same(
    lively: TransformersEngine, tmp_path: Path
) -> None:
    whole = make(lively, WISH, PROMPTS)
    path = tmp_path / "journal.jsonl"
    for allowed in (1, 2, 3, 5, 8, 100):
        left = allowed

        def progress(units: int) -> None:
            nonlocal left
            del units
            left -= 1
            if left == 0:
                raise Ended

        with pytest.raises(Ended) if allowed < 100 else nullcontext():
            found = make(JournaledEngine(lively, path), WISH, PROMPTS, progress=progress)
    # Scores that were read in other batches round otherwise; what was said and chosen is the same.
    assert all(torch.equal(found.vector[layer], whole.vector[layer]) for layer in range(3))
    assert found.choice.best.use == whole.choice.best.use
    assert found.choice.best.strength == whole.choice.best.strength
    assert [row.examples for row in found.check.rows] == [r.examples for r in whole.check.rows]
    scores = [row.score.value for row in whole.check.rows]
    assert [row.score.value for row in found.check.rows] == pytest.approx(scores, abs=1e-3)
