"""Layers, tokens and strength of a vector fitted from pairs, chosen by effect.

The positive prompt of a pair is an instruction, and the negative one its opposite: a vector that
works makes the model answer the negative prompt as it would answer the positive one. So it is
tried on the negative prompts of pairs that it was not fitted on, and scored as a made vector is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine, SamplingParams
from steer.engines.journal import remembered
from steer.errors import SteerError
from steer.fit.data.pairs import Pair, Prompt
from steer.fit.data.where import WhereName
from steer.fit.make.asking import Asked
from steer.fit.make.choosing import Choice, Ground, choose, grid
from steer.fit.make.choosing import steps as choosing_steps
from steer.fit.make.obedience import MIN_OBEDIENCE, obedience
from steer.fit.make.trials import VectorPlans, with_use
from steer.fit.measure.answers import GROUP, Progress, answers_under
from steer.prompts import Marked, prompt_json, render

QUESTIONS = 12
MORE = 20
"""Pairs that the best uses are tried on again, of those that come after."""

SCALED_ON = 16


@dataclass(frozen=True)
class Chosen:
    """The vector with its use as the card's default, and how that was chosen: `choice` is None
    where it could not be chosen by effect, and `note` says why."""

    vector: ControlVector
    choice: Choice | None
    note: str


def choose_for_pairs(
    engine: Engine,
    vector: ControlVector,
    pairs: Sequence[Pair],
    *,
    where: WhereName | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Chosen:
    """Tries `vector` on `pairs`, which it was not fitted on: runs of its layers, at several
    strengths, on the tokens `where` (None: on all, and from the answer's opening on).

    Where the model answers both prompts of a pair alike, or no trial leaves the text sound, the
    card stays as it is. `progress` is told of `most_steps` in all, what was not needed at the end.
    Raises `SteerError` as the engine does.
    """
    left = most_steps(len(pairs))

    def count(units: int) -> None:
        nonlocal left
        left -= units
        if progress is not None:
            progress(units)

    try:
        known = _as_before(engine, vector, pairs)
        found = _choice(engine, known, pairs, where, seed, count)
    except _Unseen as reason:
        count(left)
        return Chosen(vector, None, f"its use was chosen by separation: {reason}")
    count(left)
    best = found.best
    note = (
        f"layers {best.use.layers[0]}–{best.use.layers[-1]}, {best.use.where}, strength "
        f"{best.strength:.3g}: score {best.score:.2f}, {best.valid:.0%} sound, chosen from "
        f"{len(found.trials)} trials"
    )
    return Chosen(with_use(known, best), found, note)


def most_steps(pairs: int) -> int:
    """How much `choose_for_pairs` tells `progress` of."""
    questions = min(QUESTIONS, pairs)
    more = min(MORE, pairs - questions)
    uses = len(grid(range(1024), ("fitted",)))
    return 2 * min(SCALED_ON, pairs) + choosing_steps(uses, questions, more=more)


class _Unseen(Exception):
    """Why the effect cannot be seen on these pairs."""


def _choice(
    engine: Engine,
    vector: ControlVector,
    pairs: Sequence[Pair],
    where: WhereName | None,
    seed: int,
    progress: Progress | None,
) -> Choice:
    sampling = SamplingParams(max_tokens=32, temperature=0.7, seed=seed, logprobs=0)
    used = [_without_response(pair) for pair in pairs[: max(QUESTIONS + MORE, SCALED_ON)]]
    different = [pair for pair in used if pair.positive != pair.negative]
    if len(different) < 4:
        raise _Unseen(
            f"of {len(used)} pairs that it was not fitted on, {len(different)} ask for different "
            "things"
        )
    scaled = different[:SCALED_ON]
    told, opposed = answers_under(
        engine,
        [[pair.positive for pair in scaled], [pair.negative for pair in scaled]],
        [None, None],
        sampling=sampling,
        group=GROUP,
        progress=progress,
    )
    asked = [_asked(engine, pair) for pair in different]
    try:
        followed = obedience(engine, asked[: len(scaled)], opposed, told, opposed, known=asked)
    except SteerError as error:
        raise _Unseen(str(error)) from None
    if followed.area < MIN_OBEDIENCE:
        raise _Unseen(
            "the model's answers to the positive and the negative prompts are told apart "
            f"{followed.area:.0%} of the time, where chance is 50%"
        )
    everything: list[Prompt] = [pair.negative for pair in different]
    prompts, more = everything[:QUESTIONS], everything[QUESTIONS : QUESTIONS + MORE]
    ground = Ground.of(
        engine, prompts, asked, opposed[: len(prompts)], followed.scorer, sampling, progress
    )
    uses = grid(vector.card.layers, ("fitted",), where or "all")
    wheres: tuple[WhereName, ...] = ("onward",) if where is None else ()
    try:
        return choose(
            ground, VectorPlans(engine, {"fitted": vector}), uses, wheres=wheres, more=more
        )
    except SteerError as error:
        if error.code != "no_sound_use":
            raise
        raise _Unseen(str(error)) from None


def _as_before(engine: Engine, vector: ControlVector, pairs: Sequence[Pair]) -> ControlVector:
    """The vector to the bit as it was when this work was begun: what was said belongs to that."""
    tried_on = [[prompt_json(one.positive), prompt_json(one.negative)] for one in pairs]
    known = remembered(
        engine,
        ["fitted", vector.card.name, vector.card.layers, tried_on],
        lambda: torch.frombuffer(bytearray(vector.to_bytes()), dtype=torch.uint8),
    )
    return ControlVector.from_bytes(known.numpy().tobytes(), name=vector.card.name)


def _asked(engine: Engine, pair: Pair) -> Asked:
    told, opposed = (tuple(render(engine.tokenizer, one)) for one in (pair.positive, pair.negative))
    return Asked(opposed, told, opposed)


def _without_response(pair: Pair) -> Pair:
    """What the model is asked, without what it is made to have said."""
    sides = (
        one.prompt if isinstance(one, Marked) else one for one in (pair.positive, pair.negative)
    )
    return Pair(*sides)
