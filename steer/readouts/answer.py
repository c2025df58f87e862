"""Read-outs as JSON: what a client is told of each token."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from steer.artefacts.sae.labels import FeatureLabel
from steer.prompts import token_texts
from steer.readouts.plan import ReadoutPlan
from steer.readouts.readers import (
    DetectorReader,
    FeatureReader,
    LensReader,
    NormReader,
    ProjectionReader,
    Reader,
    SizeReader,
    TopFeaturesReader,
)

Entry = dict[str, Any]


@dataclass(frozen=True)
class ReadoutWriter:
    """Writes the read-outs of one request, whose prompt has so many tokens.

    A number that is not finite is written as null: JSON knows none.
    """

    plan: ReadoutPlan
    prompt_length: int
    tokenizer: Any
    _texts: dict[int, str] = field(default_factory=dict, init=False, repr=False)
    """Of the tokens so far: a lens names the same ones again and again."""

    def entry(
        self, position: int, token: int, numbers: Sequence[float], kl: float | None = None
    ) -> Entry:
        """One token: where it stands, what it is, and what was read of it."""
        found: Entry = {
            "position": position,
            "token": self._text(token),
            "id": token,
            "phase": "prompt" if position < self.prompt_length else "generation",
        }
        if numbers:
            for reader, columns in self.plan.columns():
                field, entries = self._described(reader, numbers[columns])
                found.setdefault(field, []).extend(entries)
        if kl is not None:
            found["kl"] = _number(kl)
        return found

    @cached_property
    def counts(self) -> Mapping[str, int]:
        """How many numbers of a token each field has."""
        counts: dict[str, int] = {}
        for reader in self.plan.readers:
            counts[reader.field] = counts.get(reader.field, 0) + reader.width
        return counts

    def _described(self, reader: Reader, numbers: Sequence[float]) -> tuple[str, list[Entry]]:
        at: Entry = {"layer": reader.point.layer, "site": reader.point.site}
        match reader:
            case NormReader() | SizeReader():
                entries = [{**at, "value": _number(numbers[0])}]
            case ProjectionReader():
                pairs = zip(reader.names, numbers, strict=True)
                entries = [{"vector": name, **at, "value": _number(one)} for name, one in pairs]
            case DetectorReader():
                entries = [{"detector": reader.name, **at, "value": _number(numbers[0])}]
            case FeatureReader():
                active = [
                    _feature(feature, value, reader.labels)
                    for feature, value in zip(reader.features, numbers, strict=True)
                ]
                entries = [{"sae": reader.name, **at, "features": active}]
            case TopFeaturesReader():
                values, places = numbers[: reader.top], numbers[reader.top :]
                top = [
                    _feature(int(place), value, reader.sae.labels)
                    for value, place in zip(values, places, strict=True)
                    if value > 0
                ]
                entries = [{"sae": reader.name, **at, "top": top}]
            case LensReader():
                entries = [{**at, **self._lens(reader, numbers)}]
        return reader.field, entries

    def _lens(self, reader: LensReader, numbers: Sequence[float]) -> Entry:
        chances, tokens = numbers[: reader.top], numbers[reader.top : -1]
        if not all(map(math.isfinite, tokens)):
            return {"top": None, "entropy": None}
        top = [
            {"token": self._text(int(token)), "id": int(token), "probability": _number(chance)}
            for chance, token in zip(chances, tokens, strict=True)
        ]
        named = {} if reader.name is None else {"lens": reader.name}
        return {**named, "top": top, "entropy": _number(numbers[-1])}

    def _text(self, token: int) -> str:
        text = self._texts.get(token)
        if text is None:
            text = self._texts[token] = token_texts(self.tokenizer, [token])[0]
        return text


def _feature(feature: int, activation: float, labels: Mapping[int, FeatureLabel]) -> Entry:
    found: Entry = {"feature": feature, "activation": _number(activation)}
    label = labels.get(feature)
    return found if label is None else {**found, "label": label.told}


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
