"""Answers of the model itself as data."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.errors import SteerError
from steer.fit.data.instruction import Placement, Telling
from steer.fit.data.preferences import PreferenceSet, Side, require_answers
from steer.fit.measure.answers import Progress, answers_under
from steer.plan.plan import SteeringPlan
from steer.prompts.roles import RoleRanges


def with_own_answers(
    engine: Engine,
    texts: Sequence[Sequence[int]],
    count: int,
    *,
    temperature: float = 1.0,
    seed: int = 0,
    first: int = 0,
    plan: SteeringPlan | None = None,
    roles: Callable[[int], RoleRanges | None] = lambda _: None,
) -> list[tuple[int, ...]]:
    """Each text with an answer of the model's own, of up to `count` tokens; each is drawn with
    `seed` and the text's number, counted from `first`, so that it is the same in any batch. `plan`
    steers it; `roles` says whose words the tokens of a text are, by its number."""
    asked = []
    for n, text in enumerate(texts, start=first):
        room = max(1, min(count, engine.info.max_length - len(text)))
        sampling = SamplingParams(max_tokens=room, temperature=temperature, seed=seed + n)
        asked.append(GenerationRequest(f"answer-{n}", tuple(text), sampling, plan, roles=roles(n)))
    answers = engine.complete(asked)
    return [(*text, *one.tokens) for text, one in zip(texts, answers, strict=True)]


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
    progress: Progress | None = None,
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
        [said] = answers_under(engine, [prompts], [None], sampling=sampling, progress=progress)
        for n, one in zip(missing, said, strict=True):
            cut = items[n].cut if one.ended else items[n].cut | {side}
            items[n] = replace(items[n], **{side: one.text}, cut=cut)
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
