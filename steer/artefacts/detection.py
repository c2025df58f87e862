"""What the card of a detector says: how its scores are pooled, and how well it tells."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

from steer.artefacts.calibration import MeasuredInterval

MAX_WINDOW = 256
"""The most tokens that are pooled."""

Pooling: TypeAlias = Literal["max", "mean"]
Rate: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Threshold: TypeAlias = Literal["given", "false_positive_rate", "conformal"]


class _DetectionPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class DetectorMeasures(_DetectionPart):
    """How a detector did on texts that neither it nor its threshold was made from.

    Every text has one score: the greatest pooled score among its tokens. `auroc` is of these, and
    `shuffled` of a probe that was fitted in the same way to shuffled labels. `probe` is of the mean
    states of the texts, and `neighbours` of a vote of their nearest neighbours (2407.04485), so
    that both read the same. The rates are those at the threshold, and `roc` are the points (false
    positive rate, true positive rate) of the curve.
    """

    auroc: MeasuredInterval
    probe: MeasuredInterval
    neighbours: MeasuredInterval
    shuffled: MeasuredInterval
    true_positive_rate: Rate
    false_positive_rate: Rate
    positive: Annotated[int, Field(ge=1)]
    negative: Annotated[int, Field(ge=1)]
    roc: Annotated[tuple[tuple[Rate, Rate], ...], Field(max_length=256)] = ()


class Detection(_DetectionPart):
    """What a detector detects and how: `pooling` of the scores of the `last` tokens so far.

    `threshold` says how the threshold was chosen, and `rate` the share of harmless texts that it
    was to fire on at most, over `calibration` of them.
    """

    detects: Annotated[str, Field(max_length=4096)] = ""
    source: Literal["probe", "feature"] = "probe"
    pooling: Pooling = "max"
    last: Annotated[int, Field(ge=1, le=MAX_WINDOW)] = 1
    threshold: Threshold = "given"
    rate: Rate | None = None
    calibration: Annotated[int, Field(ge=1)] | None = None
    measures: DetectorMeasures | None = None
