"""From a sentence to features: which tell what it asks for, and which of them do it.

1. Neutral questions are answered by the model that is told the sentence, and by the one that is
   told its opposite. The candidates are the features that tell the two apart (`contrast`): in the
   answers, read without the words that made them; and on the token that opens the answer, read
   with them, where a model often settles how it will answer.
2. Each is raised to the same mean KL, beside directions of chance, and the questions are answered.
   An answer counts by how much likelier it is to the told model than to the opposed one
   (`steer.fit.make.obedience`): what the words do, the feature should.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.base import Engine, SamplingParams
from steer.errors import SteerError
from steer.fit.data.instruction import Placement
from steer.fit.data.prompt import Positions
from steer.fit.features.contrast import LEAST, LEVEL, Contrast, ContrastFeature, contrast
from steer.fit.features.effect import (
    EffectGround,
    EffectOptions,
    Raised,
    effect_steps,
    raised_features,
    raising,
)
from steer.fit.features.pooling import pooled_activations
from steer.fit.features.suggestion import SuggestedFeature, Suggestions
from steer.fit.make import placing
from steer.fit.make.asking import NEUTRAL, Asked, Interview
from steer.fit.make.obedience import readings
from steer.fit.measure.answers import Answer, Progress, answers_under, mean
from steer.fit.measure.nulls.comparison import p_value, q_values
from steer.prompts import Marked, Prompt
from steer.spec import SteeringSpec, parse_spec

RAISED_ON = 8
"""Questions that the raised features are asked."""


@dataclass(frozen=True)
class SuggestOptions:
    """What is asked for, and how features are looked for: `candidates` of them are raised to `kl`
    nats, beside `nulls` of each kind. `place` is where the model is told (None: where it listens
    best)."""

    instruction: str
    opposite: str = ""
    place: Placement | None = None
    candidates: int = 8
    kl: float = 0.3
    nulls: int = 10
    max_tokens: int = 32
    temperature: float = 0.7
    seed: int = 0

    @property
    def sampling(self) -> SamplingParams:
        return SamplingParams(
            max_tokens=self.max_tokens, temperature=self.temperature, seed=self.seed, logprobs=0
        )


def suggest(
    engine: Engine,
    sae: SAE,
    name: str,
    questions: Sequence[Prompt],
    options: SuggestOptions,
    *,
    labels: Mapping[int, FeatureLabel] | None = None,
    progress: Progress | None = None,
) -> Suggestions:
    """Features of the SAE, which is registered as `name`, for what `options` ask for.

    `progress` is told of `suggest_steps`. Raises `SteerError` (`too_few_texts`, `no_features`).
    """
    talk = Interview(
        engine, options.instruction, options.opposite, options.sampling, progress=progress
    )
    talk = talk.at(options.place or placing.best_place(talk, questions))
    told, opposed = talk.answers(
        [talk.told(one) for one in questions], [talk.opposed(one) for one in questions]
    )
    answered = _answered(questions, told), _answered(questions, opposed)
    opened = [talk.told(one) for one in questions], [talk.opposed(one) for one in questions]
    read_at: list[tuple[Sequence[Sequence[Prompt]], Positions]] = [
        (answered, "response"),
        (opened, "last"),
    ]
    found = [
        _told_apart(engine, sae, sides, at, options, labels, progress) for sides, at in read_at
    ]
    candidates = _candidates(found, options.candidates)
    few = questions[:RAISED_ON]
    [plain] = talk.answers(few)
    ground = EffectGround.along(engine, sae, plain, _effect_options(options))
    raised = raised_features(ground, [one.feature for one in candidates], progress=progress)
    answers = answers_under(
        engine,
        [few] * len(raised.plans),
        raised.plans,
        sampling=options.sampling,
        progress=progress,
    )
    if progress is not None:
        progress(raised.missed * len(few))
    asked = talk.asked(few)
    gains = [_gain(engine, asked, said) for said in (*answers, plain, told[: len(few)])]
    usual, by_words = gains[-2:]
    return Suggestions(
        instruction=options.instruction,
        opposite=options.opposite or NEUTRAL,
        place=talk.place,
        questions=len(questions),
        tested=found[0].tested,
        told=by_words - usual,
        features=_ranked(name, candidates, raised, answers, np.array(gains[:-2]) - usual),
    )


def suggest_steps(questions: int, options: SuggestOptions) -> int:
    """The most that `suggest` tells `progress` of."""
    few = min(RAISED_ON, questions)
    directions = effect_steps(options.candidates, _effect_options(options))
    listening = 0 if options.place else placing.steps(questions)
    return listening + 6 * questions + few + directions * (1 + few)


def _effect_options(options: SuggestOptions) -> EffectOptions:
    return EffectOptions(
        kl=options.kl, nulls=options.nulls, max_tokens=options.max_tokens, seed=options.seed
    )


def _told_apart(
    engine: Engine,
    sae: SAE,
    sides: Sequence[Sequence[Prompt]],
    at: Positions,
    options: SuggestOptions,
    labels: Mapping[int, FeatureLabel] | None,
    progress: Progress | None,
) -> Contrast:
    """The features that tell the two sides apart, by their means over the tokens `at`."""
    rows = [
        pooled_activations(engine, sae, side, "mean", at=at, progress=progress) for side in sides
    ]
    return contrast(*rows, labels=labels, top=4 * options.candidates, seed=options.seed)


def _answered(questions: Sequence[Prompt], answers: Sequence[Answer]) -> list[Prompt]:
    """The plain questions with answers that have any text; raises `SteerError`."""
    found: list[Prompt] = [
        Marked(one.prompt if isinstance(one, Marked) else one, response=answer.text)
        for one, answer in zip(questions, answers, strict=True)
        if answer.text.strip()
    ]
    if len(found) < LEAST:
        raise SteerError(
            f"only {len(found)} answers have any text, and {LEAST} are needed: ask more questions, "
            "or let answers be longer",
            code="too_few_texts",
            param="/prompts",
        )
    return found


def _candidates(found: Sequence[Contrast], count: int) -> list[ContrastFeature]:
    """The features that fire on the told side, the best of each contrast in turn. Raises
    `SteerError` (`no_features`)."""
    ranked = [[one for one in each.features if one.fires_on == "positive"] for each in found]
    chosen: dict[int, ContrastFeature] = {}
    for several in itertools.zip_longest(*ranked):
        for one in several:
            if one is not None and len(chosen) < count:
                chosen.setdefault(one.feature, one)
    if not chosen:
        raise SteerError(
            "no feature fires more on answers under this instruction: the model may not follow it "
            "(try --place after), or the SAE may have no feature for it",
            code="no_features",
        )
    return list(chosen.values())


def _gain(engine: Engine, asked: Sequence[Asked], answers: Sequence[Answer]) -> float:
    """The mean of how much likelier the answers are to the told model, in nats a token."""
    read = readings(engine, asked, [one.tokens for one in answers])
    return mean([one.gain for one in read if one is not None])


def _ranked(
    name: str,
    candidates: Sequence[ContrastFeature],
    raised: Raised,
    answers: Sequence[Sequence[Answer]],
    gains: np.ndarray,
) -> tuple[SuggestedFeature, ...]:
    chance = gains[raised.features :].tolist()
    each = [p_value(float(gains[n]), chance) if chance else None for n in range(len(candidates))]
    found = []
    for place, (one, p, q) in enumerate(zip(candidates, each, q_values(each), strict=True)):
        match, gain = raised.matches[place], float(gains[place])
        found.append(
            SuggestedFeature(
                feature=one.feature,
                label=one.label,
                auroc=one.auroc,
                held_out=one.held_out,
                confirmed=one.confirmed,
                gain=gain,
                null=mean(chance) if chance else None,
                p=p,
                q=q,
                causes=p is not None and p <= LEVEL,
                strength=match.strength,
                kl=match.kl,
                reached=match.reached,
                example=answers[place][0].text,
                spec=clamp_spec(name, one.feature, match.strength),
            )
        )
    return tuple(sorted(found, key=lambda one: -one.gain))


def clamp_spec(name: str, feature: int, strength: float) -> dict[str, Any]:
    """The spec that raises a feature, as JSON; the strength in four digits."""
    spec: SteeringSpec = parse_spec(raising(name, [feature], float(f"{strength:.4g}")))
    found: dict[str, Any] = spec.model_dump(mode="json", exclude_defaults=True)
    found["interventions"] = [{"kind": "clamp", **item} for item in found["interventions"]]
    return found
