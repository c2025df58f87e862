"""From a sentence to a calibrated vector: answer, read, fit, choose, check, calibrate.

The questions are parted: the vector is fitted on some, its layers, tokens and strength are chosen
on others, and again among the best on more; what the table says was measured on the rest.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from steer.artefacts.calibration import Calibration
from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.engines.journal import remembering
from steer.errors import SteerError
from steer.fit.data.pairs import Prompt
from steer.fit.make import checking, choosing, placing
from steer.fit.make.asking import NEUTRAL, Interview
from steer.fit.make.contrast import SOURCES, AnswerPair, contrast_states, directions
from steer.fit.make.made import Made
from steer.fit.make.obedience import MIN_OBEDIENCE, Obedience, SoundScorer, obedience
from steer.fit.make.trials import VectorPlans, with_use
from steer.fit.make.wish import QuestionParts, Wish
from steer.fit.measure.answers import Progress
from steer.fit.measure.calibrate import calibrate, prompts_sha256, steps_of
from steer.fit.measure.nulls.directions import refit_pairs
from steer.fit.measure.scoring import AnswerScorer, Scorer
from steer.fit.methods.card import made_on
from steer.fit.methods.method import METHODS
from steer.fit.methods.separation import Separation

DOSES = (0.25, 0.5, 0.75, 1.0, 1.25)
"""The strengths of the calibration, in multiples of the one that was chosen."""

_SCALED_ON = 16


def make(
    engine: Engine,
    wish: Wish,
    prompts: Sequence[Prompt],
    *,
    scorer: AnswerScorer | Scorer | None = None,
    scorer_name: str | None = None,
    progress: Progress | None = None,
) -> Made:
    """Makes the vector of `wish` on `prompts`. A `scorer` (0 to 1, and `valid` where it can tell)
    takes the place of the instruction's own likelihood.

    `progress` is told of `work_of` steps in all; what it raises ends the work. Raises `SteerError`:
    `no_prompts`, `instruction_not_followed` where the words do nothing to this model,
    `no_sound_use` where every trial breaks the text.
    """
    parts = QuestionParts.of(prompts, wish.seed)
    engine = remembering(engine)
    talk = Interview(engine, wish.instruction, wish.opposite, wish.sampling, progress=progress)
    talk = talk.at(wish.place or placing.best_place(talk, parts.fitted))
    exchanges, followed = _listen(talk, parts)
    judge = SoundScorer(scorer, followed.scorer) if scorer else followed.scorer
    layers = range(engine.info.n_layers)
    states = contrast_states(engine, exchanges, site=wish.site, layers=layers, progress=progress)
    vectors = {source: _vector(engine, wish, rows) for source, rows in states.items()}
    [plain] = talk.answers(parts.chosen)
    ground = choosing.Ground.of(
        engine,
        parts.chosen,
        talk.asked(parts.chosen),
        plain,
        judge,
        wish.sampling,
        progress,
    )
    choice = choosing.choose(
        ground,
        VectorPlans(engine, vectors),
        choosing.grid(layers, SOURCES),
        more=parts.run_off,
    )
    chosen = vectors[choice.best.use.source]
    rows = states[choice.best.use.source]
    found = checking.check(
        talk,
        chosen,
        choice.best,
        parts.checked,
        judge,
        states=rows,
        refit=refit_pairs(rows, METHODS[wish.method]),
        nulls=wish.nulls,
        seed=wish.seed,
    )
    story = _story(talk, wish, prompts, parts, followed, ground.said_kl, choice)
    used = with_use(chosen, choice.best, **story, **made_on(engine))
    calibration, notes = _calibration(talk, used, ground, scorer_name)
    if calibration is not None:
        calibration = calibration.model_copy(update={"nulls": found.comparison})
        used = replace(used, card=used.card.model_copy(update={"calibration": calibration}))
    return Made(used, wish, talk.place, followed.area, ground.said_kl, choice, found, notes)


def work_of(wish: Wish, prompts: int, n_layers: int) -> int:
    """How much `make` tells `progress` of."""
    parts = QuestionParts.of(["?"] * prompts, wish.seed)
    fitted, chosen, checked = map(len, (parts.fitted, parts.chosen, parts.checked))
    uses = len(choosing.grid(range(n_layers), SOURCES))
    return (
        (0 if wish.place else placing.steps(fitted))
        + 2 * fitted
        + min(_SCALED_ON, fitted)
        + fitted
        + chosen
        + choosing.steps(uses, chosen, more=len(parts.run_off))
        + checking.steps(checked, 3 * wish.nulls)
        + steps_of(range(chosen), DOSES, nulls=0)
    )


def _listen(talk: Interview, parts: QuestionParts) -> tuple[list[AnswerPair], Obedience]:
    """The answers to the questions that are fitted on, and how the model follows the words."""
    scaled = parts.fitted[:_SCALED_ON]
    told, opposed, plain = talk.answers(
        [talk.told(one) for one in parts.fitted],
        [talk.opposed(one) for one in parts.fitted],
        scaled,
    )
    followed = obedience(
        talk.engine,
        talk.asked(scaled),
        plain,
        told[: len(scaled)],
        opposed[: len(scaled)],
        known=talk.asked((*parts.fitted, *parts.chosen, *parts.checked, *parts.run_off)),
    )
    if followed.area < MIN_OBEDIENCE:
        raise SteerError(
            f"the model does not do what {talk.instruction!r} asks for: its answers with it and "
            f"with {talk.opposed.text!r} are told apart {followed.area:.0%} of the time, where "
            "chance is 50%. Say it in other words, give an opposite, or name a place for it",
            code="instruction_not_followed",
            param="/instruction",
        )
    return [AnswerPair(a, b) for a, b in zip(told, opposed, strict=True)], followed


def _vector(
    engine: Engine, wish: Wish, states: Mapping[int, tuple[Tensor, Tensor]]
) -> ControlVector:
    rows = directions(states, METHODS[wish.method])
    measures = {}
    for layer, row in rows.items():
        separation = Separation(row)
        separation.add(*states[layer])
        measures[layer] = separation.measure()
    return ControlVector.of(
        rows,
        name=wish.name,
        model=engine.info.own_name,
        site=wish.site,
        description=wish.description or wish.instruction,
        licence=wish.licence,
        measures=measures,
    )


def _story(
    talk: Interview,
    wish: Wish,
    prompts: Sequence[Prompt],
    parts: QuestionParts,
    followed: Obedience,
    moved: float,
    choice: choosing.Choice,
) -> dict[str, Any]:
    """What the card says of how the vector was made."""
    best = choice.best
    return {
        "method": f"make/{wish.method}",
        "instruction": wish.instruction,
        "opposite": wish.opposite or NEUTRAL,
        "place": talk.place,
        "positions": best.use.source,
        "data_sha256": prompts_sha256(prompts),
        "questions": [len(parts.fitted), len(parts.chosen), len(parts.checked)],
        "run_off": [len(choice.run_off), len(parts.run_off)],
        "obedience": round(followed.area, 4),
        "instruction_kl": round(moved, 4),
        "trials": len(choice.trials),
        "max_tokens": wish.max_tokens,
        "temperature": wish.temperature,
        "seed": wish.seed,
    }


def _calibration(
    talk: Interview, vector: ControlVector, ground: choosing.Ground, scorer_name: str | None
) -> tuple[Calibration | None, tuple[str, ...]]:
    """The dose-response around the strength that was chosen; without one, why."""
    try:
        found = calibrate(
            talk.engine,
            vector,
            ground.prompts,
            ground.scorer,
            scorer_name=scorer_name or f"instruction:{talk.instruction}",
            strengths=[vector.card.default_strength * dose for dose in DOSES],
            max_tokens=talk.sampling.max_tokens,
            temperature=talk.sampling.temperature,
            seed=talk.sampling.seed or 0,
            nulls=0,
            progress=talk.progress,
        )
    except SteerError as error:
        if error.code not in ("no_effect", "no_safe_range"):
            raise
        return None, (f"not calibrated: {error}",)
    return found.calibration, ()
