"""What is known about single features, and how it is searched."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cached_property
from typing import Any

from pydantic import BaseModel, ConfigDict, Field


class LabelConfidence(BaseModel):
    """How well a label says when its feature fires: of the texts that it predicts, the share on
    which the feature fires (`precision`), and of those on which it fires, the share that it
    predicts (`recall`)."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    precision: float = Field(ge=0, le=1)
    recall: float = Field(ge=0, le=1)


class FeatureLabel(BaseModel):
    """What one feature is about.

    `attribute` and `direction` name the known attribute and the class that the feature goes with;
    `auroc` is how well its activation tells that class apart on held-out data, `effect` how far
    clamping it moves the attribute's rate, `density` the share of tokens on which it is active,
    `largest` its largest activation seen. `source` says whose label it is, where it is not the
    SAE's own, and `confidence` how far it was found to be right.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    text: str = ""
    attribute: str | None = None
    direction: str | None = None
    auroc: float | None = Field(default=None, ge=0, le=1)
    effect: float | None = None
    density: float | None = Field(default=None, ge=0, le=1)
    largest: float | None = None
    tokens: tuple[str, ...] = ()
    # Written only where they say something, so that SAEs with labels keep their hash.
    source: str | None = Field(default=None, exclude_if=lambda value: value is None)
    confidence: LabelConfidence | None = Field(default=None, exclude_if=lambda value: value is None)

    @cached_property
    def told(self) -> dict[str, Any]:
        """What it says, as JSON; one object for all who show it, which nobody changes."""
        return self.model_dump(exclude_none=True)


class FeatureMatch(BaseModel):
    """A search result: the feature, its label, and as `score` the share of the query's words found,
    or the cosine of the two meanings."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    feature: int
    label: FeatureLabel
    score: float


def search_labels(
    labels: Mapping[int, FeatureLabel], query: str, *, limit: int = 20
) -> tuple[FeatureMatch, ...]:
    """Features whose labels hold words of `query` (case ignored, word beginnings count), best
    first: by the share of words found, and then as `match_order` says."""
    wanted = _words(query)
    found = []
    for feature, label in labels.items():
        parts = (label.text, label.attribute or "", label.direction or "", *label.tokens)
        present = _words(" ".join(parts))
        hits = sum(any(word.startswith(want) for word in present) for want in wanted)
        if hits:
            score = hits / len(wanted)
            found.append(FeatureMatch(feature=feature, label=label, score=score))
    found.sort(key=match_order)
    return tuple(found[:limit])


def match_order(match: FeatureMatch) -> tuple[float, ...]:
    """Best first: by score, by the effect of clamping (a feature that detects need not cause), by
    AUROC, and by number."""
    label = match.label
    return -match.score, -(label.effect or 0.0), -(label.auroc or 0.0), match.feature


def _words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"\w+", text.lower()))
