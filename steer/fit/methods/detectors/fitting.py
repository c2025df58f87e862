"""A detector from labelled texts: a probe for each layer, the best one, and its threshold.

Memory: one batch of states, batch · tokens · layers · d floats, and one mean state of each text
for each layer, texts · layers · d floats.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from steer.artefacts.calibration import MeasuredInterval
from steer.artefacts.detection import Detection, DetectorMeasures, Pooling
from steer.artefacts.detector import Detector, ScoreWindow
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.labels import LabelledSet
from steer.fit.methods.card import made_on
from steer.fit.methods.detectors.parts import DividedTexts, TextPart, divided
from steer.fit.methods.detectors.probe import (
    StateProbe,
    fit_probe,
    neighbour_scores,
    shuffled_labels,
)
from steer.fit.methods.detectors.roc import auroc_interval, roc_points, share_above
from steer.fit.methods.detectors.thresholds import chosen_threshold
from steer.fit.methods.linear.reading import positions_of
from steer.fit.states import Progress, Reading, behind_first, make_reading, read_places
from steer.prompts import Prompt
from steer.spec import Site

ThresholdRule: TypeAlias = Literal["false_positive_rate", "conformal"]
Watched: TypeAlias = Literal["all", "response"]
SHUFFLES = 10
"""Labellings of chance."""


@dataclass(frozen=True)
class _Scored:
    """Texts as the probes see them: by layer the score of each, and its mean state."""

    scores: Mapping[int, list[float]]
    states: Mapping[int, Tensor]


def fit_detector(
    engine: Engine,
    texts: LabelledSet,
    *,
    name: str,
    detects: str = "",
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    tokens: Watched = "all",
    pooling: Pooling = "max",
    last: int = 1,
    threshold: ThresholdRule = "false_positive_rate",
    rate: float = 0.05,
    held_out: float = 0.3,
    seed: int = 0,
    batch: int = 16,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> Detector:
    """A detector of what the texts labelled true have and those labelled false have not.

    A text's score is the greatest pooled score among its `tokens`, which is what a detector does
    to an answer; like that, it leaves out a text's first token (`behind_first`). Of the layers the
    one with the greatest AUROC of these on a validation part is taken, the threshold is chosen on
    further harmless texts, and what the card reports is of held out ones. `progress` is told of
    every text. Raises `SteerError`.
    """
    parts = divided(texts, held_out, seed)
    # What no probe can help is said before the model is asked.
    chosen_threshold(threshold, [0.0] * len(parts.calibration.negative), rate)
    reading = make_reading(
        engine, site=site, layers=layers, positions=positions_of(tokens), batch=batch
    )
    states = _means(engine, reading, parts.fitted.prompts, progress)
    labels = _labels(parts.fitted)
    probes = {layer: fit_probe(rows, labels) for layer, rows in states.items()}
    window = Detection(detects=detects, pooling=pooling, last=last)
    valid, safe, held = (
        _scored(engine, reading, part.prompts, probes, window, progress)
        for part in (parts.validation, parts.calibration, parts.held_out)
    )
    aurocs = {n: _auroc(valid.scores[n], parts.validation, seed).value for n in reading.layers}
    layer = max(reading.layers, key=lambda n: (aurocs[n], -n))
    cut = chosen_threshold(threshold, safe.scores[layer], rate)
    detection = window.model_copy(
        update={
            "threshold": threshold,
            "rate": rate,
            "calibration": len(parts.calibration.negative),
            "measures": _measures(
                parts, held, layer, cut, (probes[layer], states[layer], labels), seed
            ),
        }
    )
    probe = probes[layer]
    return Detector.of(
        probe.weights,
        layer=layer,
        bias=probe.bias,
        threshold=cut,
        detection=detection,
        name=name,
        model=engine.info.own_name,
        site=site,
        description=description,
        licence=licence,
        provenance={
            "method": "logistic",
            "data_sha256": texts.sha256,
            "tokens": tokens,
            "seed": seed,
            "fitted_texts": len(parts.fitted.prompts),
            "validation_auroc": {str(n): round(value, 4) for n, value in aurocs.items()},
            **made_on(engine),
        },
    )


def work_of(texts: LabelledSet, held_out: float, seed: int) -> int:
    """How many texts `fit_detector` reads; raises as it does."""
    parts = divided(texts, held_out, seed)
    each = (parts.fitted, parts.validation, parts.calibration, parts.held_out)
    return sum(len(part.prompts) for part in each)


def _labels(part: TextPart) -> Tensor:
    return torch.tensor([True] * len(part.positive) + [False] * len(part.negative))


def _watched(
    engine: Engine, reading: Reading, prompts: Sequence[Prompt]
) -> Iterator[dict[int, Tensor]]:
    """Of each prompt the states `[tokens, width]` per layer that a detector looks at; of one token,
    that one."""
    for _, places, by_layer in read_places(engine, prompts, reading):
        left_out = len(places) - len(behind_first(places))
        yield {layer: states[left_out:] for layer, states in by_layer.items()}


def _means(
    engine: Engine, reading: Reading, prompts: Sequence[Prompt], progress: Progress | None
) -> dict[int, Tensor]:
    rows: dict[int, list[Tensor]] = {layer: [] for layer in reading.layers}
    for by_layer in _watched(engine, reading, prompts):
        for layer, states in by_layer.items():
            rows[layer].append(states.float().mean(0))
        if progress is not None:
            progress(1)
    return {layer: torch.stack(found) for layer, found in rows.items()}


def _scored(
    engine: Engine,
    reading: Reading,
    prompts: Sequence[Prompt],
    probes: Mapping[int, StateProbe],
    window: Detection,
    progress: Progress | None,
) -> _Scored:
    scores: dict[int, list[float]] = {layer: [] for layer in reading.layers}
    means: dict[int, list[Tensor]] = {layer: [] for layer in reading.layers}
    for by_layer in _watched(engine, reading, prompts):
        for layer, states in by_layer.items():
            means[layer].append(states.float().mean(0))
            pooled = ScoreWindow(window.pooling, window.last)
            scores[layer].append(max(map(pooled.push, probes[layer].scores(states).tolist())))
        if progress is not None:
            progress(1)
    return _Scored(scores, {layer: torch.stack(found) for layer, found in means.items()})


def _auroc(scores: Sequence[float], part: TextPart, seed: int) -> MeasuredInterval:
    cut = len(part.positive)
    return auroc_interval(scores[:cut], scores[cut:], seed=seed)


def _measures(
    parts: DividedTexts,
    held: _Scored,
    layer: int,
    threshold: float,
    fitted: tuple[StateProbe, Tensor, Tensor],
    seed: int,
) -> DetectorMeasures:
    """What is reported of the held-out texts."""
    part, scores, means = parts.held_out, held.scores[layer], held.states[layer]
    probe, states, labels = fitted
    cut = len(part.positive)
    positive, negative = scores[:cut], scores[cut:]
    chance = sorted(
        _auroc(fit_probe(states, shuffled_labels(labels, n)).scores(means).tolist(), part, n).value
        for n in range(seed, seed + SHUFFLES)
    )
    return DetectorMeasures(
        auroc=_auroc(scores, part, seed),
        probe=_auroc(probe.scores(means).tolist(), part, seed),
        neighbours=_auroc(neighbour_scores(states, labels, means).tolist(), part, seed),
        shuffled=MeasuredInterval(value=sum(chance) / SHUFFLES, low=chance[0], high=chance[-1]),
        true_positive_rate=share_above(positive, threshold),
        false_positive_rate=share_above(negative, threshold),
        positive=len(positive),
        negative=len(negative),
        roc=roc_points(positive, negative),
    )


def check_data(
    texts: LabelledSet, held_out: float, seed: int, rule: ThresholdRule, rate: float
) -> None:
    """Raises `SteerError` for what can be known to be wrong before anything is read."""
    safe = divided(texts, held_out, seed).calibration.negative
    try:
        chosen_threshold(rule, [0.0] * len(safe), rate)
    except SteerError as error:
        error.param = error.param or "/rate"
        raise
