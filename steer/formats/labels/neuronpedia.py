"""Neuronpedia's export: explanations, features and activations, a JSON object a line.

Files are `explanations/batch-N.jsonl.gz`, `features/…` and `activations/…` of a source such as
`20-gemmascope-res-16k`, which begins with the SAE's layer; rows are known by their `index`, in any
order and over any number of files. What is taken of a row:

- explanation: `description`; where there are several of a feature, the first.
- feature: `frac_nonzero`, `maxActApprox`, and of `pos_str` the tokens it promotes most.
- activation: the token at `maxValueTokenIndex`, of a few examples.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import FileFormatError

NAME = "neuronpedia"
_TOKENS = 8
_LONGEST = 4096
_SOURCE = re.compile(r"(\d+)-")


def is_row(value: Any) -> bool:
    """Whether a line's value is a row of such an export."""
    return (
        isinstance(value, dict)
        and "index" in value
        and ({"modelId", "layer"} & set(value) != set())
    )


def source_layer(source: str) -> int | None:
    """The layer that a source's name begins with; None where it begins with no number."""
    match = _SOURCE.match(source)
    return None if match is None else int(match[1])


@dataclass
class NeuronpediaRows:
    """The rows of an export as they come; `labels` is what they say together."""

    texts: dict[int, str] = field(default_factory=dict)
    figures: dict[int, dict[str, Any]] = field(default_factory=dict)
    peaks: dict[int, Counter[str]] = field(default_factory=dict)
    sources: Counter[str] = field(default_factory=Counter)

    def add(self, row: Mapping[str, Any], at: str) -> None:
        """Takes a row; raises `FileFormatError` naming its place."""
        feature = _feature(row["index"], at)
        source = row.get("layer")
        if isinstance(source, str):
            self.sources[source] += 1
        if "description" in row:
            text = row["description"]
            if not isinstance(text, str):
                raise FileFormatError(
                    f"{at}: 'description' is a text; got {text!r}", code="invalid_labels"
                )
            if text.strip():
                self.texts.setdefault(feature, text.strip()[:_LONGEST])
        elif "tokens" in row and "values" in row:
            self._add_activation(feature, row)
        else:
            self._add_feature(feature, row)

    def labels(self) -> dict[int, FeatureLabel]:
        """A label for each feature that any row names in words or tokens."""
        found = {}
        for feature in sorted({*self.texts, *self.figures, *self.peaks}):
            peaks = [token for token, _ in self.peaks.get(feature, Counter()).most_common(_TOKENS)]
            figures = dict(self.figures.get(feature, {}))
            tokens = tuple(peaks) or figures.get("tokens", ())
            text = self.texts.get(feature, "")
            if text or tokens:
                found[feature] = FeatureLabel(text=text, **{**figures, "tokens": tokens})
        return found

    def _add_feature(self, feature: int, row: Mapping[str, Any]) -> None:
        density, largest = row.get("frac_nonzero"), row.get("maxActApprox")
        figures: dict[str, Any] = {}
        if _number(density) and 0 <= density <= 1:
            figures["density"] = float(density)
        if _number(largest):
            figures["largest"] = float(largest)
        promoted = row.get("pos_str")
        if isinstance(promoted, list):
            figures["tokens"] = tuple(t for t in promoted[:_TOKENS] if isinstance(t, str))
        self.figures.setdefault(feature, figures)

    def _add_activation(self, feature: int, row: Mapping[str, Any]) -> None:
        tokens, place = row["tokens"], row.get("maxValueTokenIndex")
        if isinstance(tokens, list) and isinstance(place, int) and 0 <= place < len(tokens):
            token = tokens[place]
            if isinstance(token, str):
                self.peaks.setdefault(feature, Counter())[token] += 1


def _number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _feature(index: Any, at: str) -> int:
    if isinstance(index, str) and index.isdecimal() and len(index) < 10:
        index = int(index)
    if not isinstance(index, int) or isinstance(index, bool) or index < 0:
        raise FileFormatError(
            f"{at}: 'index' is the feature's number; got {index!r}", code="invalid_labels"
        )
    return index
