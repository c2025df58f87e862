"""How good the labels of features are."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, StrictInt

from steer.errors import SteerError
from steer.fit.requests.features.effect import (
    QUESTIONS,
    FeaturesField,
    KLField,
    QuestionsField,
    asked_questions,
    check_features,
)
from steer.fit.requests.features.request import SAERequest
from steer.fit.requests.fields import AskLabellerField, NullsField, Seed

if TYPE_CHECKING:
    from steer.artefacts.sae.labels import FeatureLabel
    from steer.engines.base import Engine
    from steer.fit.features.labeller import Labeller
    from steer.fit.measure.answers import Progress
    from steer.registry.features.scores import ScoredLabels
    from steer.registry.features.survey import Survey
    from steer.registry.registry import Registry


class ScoreRequest(SAERequest):
    """Features whose labels are scored: by raising the features and reading how much likelier that
    makes their labels, and by what the labels predict where the SAE was surveyed."""

    features: FeaturesField
    kl: KLField = 0.3
    nulls: NullsField = 10
    max_tokens: Annotated[
        StrictInt, Field(ge=1, le=1024, description="The length of an answer.")
    ] = 24
    prompts: QuestionsField = None
    seed: Annotated[
        Seed, Field(description="Draws the questions, the nulls, and the excerpts.")
    ] = 0
    ask_labeller: AskLabellerField = False

    def check(self, engine: Engine, registry: Registry) -> None:
        from steer.fit.features.effect import check_raisable

        super().check(engine, registry)
        registry.findings.files.check_writable()
        sae = registry.sae(self.sae)
        check_features(sae, self.features)
        check_raisable(engine, sae, self.features[0])
        self.labels(registry)

    def labels(self, registry: Registry) -> dict[int, FeatureLabel]:
        """The labels that are scored; raises `SteerError` (`no_labels`) for a feature without."""
        known = registry.labels(self.sae)
        found = {feature: known.get(feature) for feature in self.features}
        missing = [n for n, label in found.items() if label is None or not label.text.strip()]
        if missing:
            raise SteerError(
                f"feature {missing[0]} of {self.sae!r} has no label to score: bring labels along "
                f"with `steer sae labels import`, or make them with `steer sae labels make`",
                code="no_labels",
                param="/features",
            )
        return {n: label for n, label in found.items() if label is not None}

    def check_labeller(self, registry: Registry, labeller: Labeller) -> None:
        """Raises `SteerError` (`no_survey`, `too_many_questions`) before anything is asked."""
        try:
            registry.surveys.of(registry.entry("sae", self.sae).sha256, self.sae)
        except SteerError as error:
            raise error.at("/ask_labeller") from None
        labeller.check_questions(self.questions, "/features")

    @property
    def questions(self) -> int:
        """The most that a labeller is asked: of each feature, detection and fuzzing."""
        from steer.fit.features.predictions import QUESTIONS as OF_EACH

        return len(set(self.features)) * 2 * OF_EACH

    def work(self, engine: Engine) -> int:
        """How many steps `run` will tell `progress` of."""
        from steer.fit.features.intervention import intervention_steps

        asked = asked_questions(engine, self.prompts, self.seed, QUESTIONS)
        return intervention_steps(len(set(self.features)), 2 * self.nulls, len(asked))

    def run(
        self,
        engine: Engine,
        registry: Registry,
        labeller: Labeller | None = None,
        *,
        progress: Progress | None = None,
    ) -> ScoredLabels:
        """Scores the labels, and keeps what is found. Raises `SteerError`."""
        from steer.fit.features.effect import EffectGround, EffectOptions
        from steer.fit.features.intervention import intervention_scores
        from steer.registry.features.scores import LabelScores, ScoredLabels

        labels, sae = self.labels(registry), registry.sae(self.sae)
        options = EffectOptions(
            kl=self.kl, nulls=self.nulls, max_tokens=self.max_tokens, seed=self.seed
        )
        asked = asked_questions(engine, self.prompts, self.seed, QUESTIONS)
        ground = EffectGround.of(engine, sae, asked, options)
        texts = {feature: label.text for feature, label in labels.items()}
        result = intervention_scores(ground, texts, asked, progress=progress)
        sha256 = registry.entry("sae", self.sae).sha256
        survey = registry.surveys.find(sha256)
        told: dict[int, dict[str, Any]] = {}
        if survey is not None:
            told = self._predicted(engine, registry, survey, labels, labeller)
        found = tuple(
            LabelScores(
                feature=feature,
                model=engine.info.name,
                label=label.text,
                source=label.source,
                intervention=result.scores[feature],
                **told.get(feature, {}),
            )
            for feature, label in labels.items()
        )
        for one in found:
            registry.findings.keep(sha256, one)
        return ScoredLabels(auroc=result.auroc, features=found)

    def _predicted(
        self,
        engine: Engine,
        registry: Registry,
        survey: Survey,
        labels: dict[int, FeatureLabel],
        labeller: Labeller | None,
    ) -> dict[int, dict[str, Any]]:
        """What the labels predict: by their tokens, and by what a labeller makes of them."""
        from steer.fit.features.predictions import asked_scores, read_again, token_score

        again = read_again(engine, registry.sae(self.sae), survey, list(labels), seed=self.seed)
        told: dict[int, dict[str, Any]] = {
            n: {"tokens": token_score(again, n, label)} for n, label in labels.items()
        }
        if labeller is not None:
            asked = asked_scores(labeller, again, labels, seed=self.seed)
            for feature, (detection, fuzzing) in asked.items():
                told[feature] |= {"detection": detection, "fuzzing": fuzzing}
        return told
