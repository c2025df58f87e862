"""What is known of one feature: its label, its weights, and what a survey saw."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import BaseModel, ConfigDict

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import UnknownArtefact
from steer.registry.features.effect import OutputEffect
from steer.registry.features.scores import LabelScores
from steer.registry.features.survey import FeatureStatistics, TogetherFeature
from steer.registry.features.trust import ConceptTrust
from steer.registry.registry import Registry
from steer.spec import Site


class Neighbour(BaseModel):
    """A feature whose decoder row points nearly the same way."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: int
    cosine: float


class FeatureCard(BaseModel):
    """One feature: its label where it has one, what is read off the weights, and, where the SAE was
    surveyed, what it did on the survey's data.

    `labels` are those of all sources, the one that is shown first. `decoder_norm` is ‖W_dec[i]‖;
    `neighbours` are the features whose decoder rows point most nearly the same way; `together`
    those that fire on the same tokens. Where these were measured, `effect` is what it does to what
    the model says, `scores` how good a label is, and `trust` how purely it stands for a concept.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["steering.feature"] = "steering.feature"
    sae: str
    feature: int
    layer: int
    site: Site
    label: FeatureLabel | None
    labels: tuple[FeatureLabel, ...] = ()
    decoder_norm: float
    neighbours: tuple[Neighbour, ...]
    statistics: FeatureStatistics | None = None
    together: tuple[TogetherFeature, ...] = ()
    effect: OutputEffect | None = None
    scores: LabelScores | None = None
    trust: ConceptTrust | None = None


def feature_card(registry: Registry, name: str, feature: int) -> FeatureCard:
    """The card of a feature of the SAE `name`.

    Raises `UnknownArtefact` (`unknown_sae`, `unknown_feature`).
    """
    sae = registry.sae(name)
    if not 0 <= feature < sae.d_sae:
        raise UnknownArtefact(
            f"the SAE {name!r} has no feature {feature}: it has features 0 to {sae.d_sae - 1}",
            code="unknown_feature",
        )
    sha256 = registry.entry("sae", name).sha256
    survey = registry.surveys.find(sha256)
    known = registry.labels(name)
    scores = registry.findings.find(sha256, LabelScores, feature)
    return FeatureCard(
        sae=sae.card.name,
        feature=feature,
        layer=sae.layer,
        site=sae.site,
        label=_trusted(known.get(feature), scores),
        labels=known.every(feature),
        decoder_norm=float(sae.writes([feature])[0].norm()),
        neighbours=neighbours(sae, feature),
        statistics=None if survey is None else survey.feature(feature),
        together=() if survey is None else survey.together(feature),
        effect=registry.findings.find(sha256, OutputEffect, feature),
        scores=scores,
        trust=registry.findings.find(sha256, ConceptTrust, feature),
    )


def _trusted(label: FeatureLabel | None, scores: LabelScores | None) -> FeatureLabel | None:
    """The label with how far it was found to be right, where it is the one that was scored."""
    if label is None or scores is None or scores.label != label.text:
        return label
    return label.model_copy(update={"confidence": scores.confidence})


def neighbours(sae: SAE, feature: int, count: int = 5) -> tuple[Neighbour, ...]:
    """The `count` features whose decoder rows have the greatest cosine with that of `feature`, read
    a block of rows at a time."""
    blocks = sae.decoder.cosines(sae.writes([feature]))
    cosines = torch.cat([block[:, 0] for _, block in blocks])
    cosines[feature] = -2.0
    best = cosines.topk(min(count, sae.d_sae - 1))
    return tuple(
        Neighbour(feature=int(index), cosine=float(value))
        for value, index in zip(best.values, best.indices, strict=True)
    )
