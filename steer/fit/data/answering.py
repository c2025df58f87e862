"""Answers of the model itself as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.errors import SteerError
from steer.fit.data.instruction import Placement, Telling
from steer.fit.data.preferences import PreferenceSet, Side, require_answers
from steer.prompts import Prompt, answer_text, render

GROUP = 64
"""Answers asked for at once."""


def answers(
    engine: Engine,
    prompts: Sequence[Prompt],
    sampling: SamplingParams,
    progress: Callable[[int], None] | None = None,
) -> list[tuple[str, bool]]:
    """The model's answer to each prompt, unsteered, and whether it came to its end."""
    found: list[tuple[str, bool]] = []
    for first in range(0, len(prompts), GROUP):
        requests = [
            GenerationRequest(f"answer-{first + n}", tuple(render(engine.tokenizer, one)), sampling)
            for n, one in enumerate(prompts[first : first + GROUP])
        ]
        for one in engine.complete(requests):
            found.append((answer_text(engine.tokenizer, one.tokens), one.finish == "stop"))
        if progress is not None:
            progress(len(requests))
    return found


def completed(
    engine: Engine,
    given: PreferenceSet,
    instruction: str | None,
    *,
    sides: Sequence[Side] = ("chosen", "rejected"),
    place: Placement = "system",
    max_tokens: int = 48,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Callable[[int], None] | None = None,
) -> PreferenceSet:
    """`given` with both answers (or those of `sides`) to every prompt.

    What is missing is asked of the model, unsteered: the answer to prefer with `instruction` at
    `place`, the other without. A prompt to which it gives nothing, or the same answer both
    times, teaches nothing and is left out. `progress` is told of every answer. Raises `SteerError`
    where answers are missing and there is no instruction, or where no prompt is left.
    """
    require_answers(given, instruction, sides)
    items = list(given.items)
    for side in sides:
        missing = [n for n, one in enumerate(items) if getattr(one, side) is None]
        prompts = [items[n].prompt for n in missing]
        if side == "chosen":
            prompts = list(map(Telling(instruction or "", place), prompts))
        sampling = SamplingParams(max_tokens=max_tokens, temperature=temperature, seed=seed)
        said = answers(engine, prompts, sampling, progress)
        for n, (text, ended) in zip(missing, said, strict=True):
            cut = items[n].cut if ended else items[n].cut | {side}
            items[n] = replace(items[n], **{side: text}, cut=cut)
    kept = [
        one
        for one in items
        if all(getattr(one, side) for side in sides)
        and (len(sides) < 2 or one.chosen != one.rejected)
    ]
    if not kept:
        raise SteerError(
            "the model gives the same answer with and without the instruction to every prompt: "
            "give another instruction, or the answers themselves",
            code="no_difference",
        )
    return PreferenceSet(tuple(kept), given.sha256)
