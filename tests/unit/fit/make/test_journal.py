"""Work that was ended goes on where it was."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.make.journal import JournaledEngine
from steer.fit.make.making import make
from steer.fit.make.wish import Wish
from steer.model import HookPoint

PROMPTS = [f"{word} {n}" for n in range(8) for word in ("how", "why", "who")]
WISH = Wish("be loud!", "loud", opposite="be quiet", place="after", nulls=1, max_tokens=6, seed=1)


class Ended(Exception):
    """What a user's interrupt stands for."""


def test_it_goes_on_after_any_step_and_comes_to_the_same(
    lively: TransformersEngine, tmp_path: Path
) -> None:
    whole = make(lively, WISH, PROMPTS)
    path = tmp_path / "journal.jsonl"
    steps = 0
    for allowed in (1, 2, 3, 5, 8, 100):
        left = allowed

        def progress(units: int) -> None:
            nonlocal left, steps
            del units
            left -= 1
            steps += 1
            if left == 0:
                raise Ended

        with pytest.raises(Ended) if allowed < 100 else nullcontext():
            found = make(JournaledEngine(lively, path), WISH, PROMPTS, progress=progress)
    # Sums of other batches round otherwise; what was said and chosen is the same.
    assert found.choice.best.use == whole.choice.best.use
    assert found.choice.best.strength == pytest.approx(whole.choice.best.strength, rel=1e-3)
    assert [row.examples for row in found.check.rows] == [r.examples for r in whole.check.rows]
    scores = [row.score.value for row in whole.check.rows]
    assert [row.score.value for row in found.check.rows] == pytest.approx(scores, abs=1e-3)


def test_what_was_said_is_not_asked_again(lively: TransformersEngine, tmp_path: Path) -> None:
    path = tmp_path / "journal.jsonl"
    sampling = SamplingParams(max_tokens=4, temperature=0.7, seed=3, logprobs=0)
    requests = [GenerationRequest(f"r{n}", (65, 66, n), sampling) for n in range(3)]
    read = CaptureRequest([[65, 66, 67, 68], [69, 70, 71]], logprobs=0, tail=2)
    first = JournaledEngine(lively, path)
    said, seen = first.complete(requests), first.capture(read)
    path.write_text(path.read_text() + '["cut')  # by a crash

    again = JournaledEngine(_Silent(lively), path)  # type: ignore[arg-type]

    assert [one.tokens for one in again.complete(requests)] == [one.tokens for one in said]
    assert [one.logprobs for one in again.complete(requests)] == [one.logprobs for one in said]
    assert [one.logprobs for one in again.capture(read)] == [one.logprobs for one in seen]
    states = CaptureRequest([[65]], (HookPoint(0),))
    assert JournaledEngine(lively, path).capture(states)[0].states.keys() == {HookPoint(0)}
    assert JournaledEngine(lively, path).stats() == lively.stats()


class _Silent:
    """An engine that must not be asked."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.info, self.capabilities = engine.info, engine.capabilities
        self.tokenizer = engine.tokenizer
