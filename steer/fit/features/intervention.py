"""Intervention scores of labels, with the model that is served (2410.13928).

What a feature does to what the model says is its label's test: after answers that were given with
the feature raised, the model is asked what they are about, and how likely it finds the label is
read off.

    gain(i, z) = mean over answers of log p(z | answers with i raised) − log p(z | unsteered ones)

A label is good if its gain is greater than those of other features' labels (`shuffled`), and than
its own gain under directions of chance that are raised to the same KL.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from steer.engines.base import Engine, SamplingParams
from steer.fit.features.effect import EffectGround, Raised, raised_features
from steer.fit.make.obedience import mean_logprobs
from steer.fit.measure.answers import Answer, Progress, answers_under
from steer.fit.measure.nulls.comparison import p_value, q_values
from steer.prompts import Prompt, as_chat, part_tokens, render
from steer.registry.features.scores import InterventionScore

QUESTION = (
    "Here is a text:\n\n{text}\n\nSay in one short phrase what the text is about, or what it is "
    "like."
)


@dataclass(frozen=True)
class InterventionResult:
    """The scores by feature; `auroc` is how often a feature's own label has a greater gain than
    another's, over all features (None for a single label)."""

    scores: Mapping[int, InterventionScore]
    auroc: float | None


def intervention_scores(
    ground: EffectGround,
    labels: Mapping[int, str],
    prompts: Sequence[Prompt],
    *,
    progress: Progress | None = None,
) -> InterventionResult:
    """Scores the label of each feature on answers to `prompts`, which the ground was made of.

    `progress` is told of `intervention_steps`. Raises `SteerError`.
    """
    features = list(labels)
    raised = raised_features(ground, features, progress=progress)
    sampling = SamplingParams(max_tokens=ground.options.max_tokens, temperature=0.0, logprobs=0)
    answers = answers_under(
        ground.engine,
        [prompts] * len(raised.plans),
        raised.plans,
        sampling=sampling,
        progress=progress,
    )
    if progress is not None:
        progress(raised.missed * len(prompts))
    texts = list(labels.values())
    plain = _label_logprobs(ground.engine, ground.references.answers, texts)
    gains = np.stack(
        [_label_logprobs(ground.engine, one, texts) - plain for one in answers]
    )  # [directions, labels]
    return scored_gains(raised, features, texts, gains)


def intervention_steps(features: int, nulls: int, prompts: int) -> int:
    """How much `intervention_scores` tells `progress` of: directions, and answers."""
    return (features + nulls) * (1 + prompts)


def scored_gains(
    raised: Raised, features: Sequence[int], texts: Sequence[str], gains: NDArray[np.float64]
) -> InterventionResult:
    """The scores from `gains` `[directions, labels]`: features first, in the labels' order."""
    own, chance = gains[: raised.features], gains[raised.features :]
    true, shuffled = np.diagonal(own), []
    each = [
        p_value(float(one), row.tolist()) if len(row) else None
        for one, row in zip(true, chance.T, strict=True)
    ]
    corrected = q_values(each)
    scores = {}
    for place, feature in enumerate(features):
        others = [own[place, n] for n, text in enumerate(texts) if text != texts[place]]
        shuffled += others
        null = chance[:, place]
        low, high = np.quantile(null, [0.025, 0.975]) if len(null) else (None, None)
        gain = float(true[place])
        scores[feature] = InterventionScore(
            kl=raised.matches[place].kl,
            reached=raised.matches[place].reached,
            gain=gain,
            shuffled=float(np.mean(others)) if others else None,
            null=float(null.mean()) if len(null) else None,
            null_low=low,
            null_high=high,
            p=each[place],
            q=corrected[place],
        )
    if not shuffled:
        return InterventionResult(scores, None)
    above = true[:, None] > np.array(shuffled)[None]
    same = true[:, None] == np.array(shuffled)[None]
    return InterventionResult(scores, float((above + same / 2).mean()))


def _label_logprobs(
    engine: Engine, answers: Sequence[Answer], labels: Sequence[str]
) -> NDArray[np.float64]:
    """For each label the mean over the answers of its log-probability, in nats, as what is said of
    the answer."""
    tokenizer = engine.tokenizer
    heads = [
        list(render(tokenizer, as_chat(tokenizer, QUESTION.format(text=one.text))))
        for one in answers
    ]
    tails = [part_tokens(tokenizer, label) for label in labels]
    rows = [(head, tail) for head in heads for tail in tails]
    means = np.array(mean_logprobs(engine, rows)).reshape(len(heads), len(labels))
    found: NDArray[np.float64] = means.mean(0) * [len(tail) for tail in tails]
    return found
