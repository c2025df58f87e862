"""How good a feature's label is: the finding of `steer sae score`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from steer.artefacts.sae.labels import LabelConfidence
from steer.registry.features.findings import Finding


class PredictionScore(BaseModel):
    """What a label predicts, against what the feature does: of `asked` excerpts, half of which
    show it, `precision`, `recall` and the mean of the shares that are right on both sides
    (`balanced`; .5 is chance). Precision is 0 where nothing is predicted."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    asked: int
    precision: float
    recall: float
    balanced: float


class InterventionScore(BaseModel):
    """How much likelier the label is after what the model says with the feature raised
    (2410.13928).

    `gain` is the mean of log p(label | raised) − log p(label | unsteered), in nats of the whole
    label; `shuffled` the mean gain of other features' labels, `null` that of this label under
    directions of chance at the same KL, from `null_low` to `null_high` of which are all but a
    fortieth on either side, `p` the chance of one with as great a gain, and `q` the false discovery
    rate of p over the labels that were scored together (None: of an older version).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    kl: float
    reached: bool
    gain: float
    shuffled: float | None
    null: float | None
    null_low: float | None
    null_high: float | None
    p: float | None
    q: float | None = None


class LabelScores(Finding):
    """How good the label `label` (of `source`; None: the SAE's own) is.

    `tokens` is what the tokens that it names predict by themselves, on texts that made none of
    them; `detection` and `fuzzing` what a labeller predicts from its words: which excerpts make
    the feature fire, and which tokens are marked that do. `intervention` is read by the model that
    is served.
    """

    kept_as: ClassVar[str] = "score"

    model: str
    label: str
    source: str | None
    tokens: PredictionScore | None = None
    detection: PredictionScore | None = None
    fuzzing: PredictionScore | None = None
    intervention: InterventionScore | None = None

    @property
    def confidence(self) -> LabelConfidence | None:
        """Precision and recall of what the label predicts: by its words, or else its tokens."""
        best = self.detection or self.tokens
        if best is None:
            return None
        return LabelConfidence(precision=best.precision, recall=best.recall)


class ScoredLabels(BaseModel):
    """The scores of labels; `auroc` is how often what a feature does to what is said makes its own
    label likelier than it makes another's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    auroc: float | None
    features: tuple[LabelScores, ...]
