"""Labels in plain JSON: `{"5": "French words"}` in one object or in many lines, or a line
`{"feature": 5, "text": "French words"}` each, which may have the other fields of a label too."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import ValidationError

from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import FileFormatError


def plain_labels(value: Any, at: str) -> Mapping[int, FeatureLabel]:
    """The labels in one JSON value; raises `FileFormatError` naming its place."""
    if isinstance(value, dict) and "feature" in value:
        rest = {key: one for key, one in value.items() if key != "feature"}
        return {_feature(value["feature"], at): _label(rest, at)}
    if not isinstance(value, dict):
        raise FileFormatError(
            f'{at}: labels are an object such as {{"5": TEXT}} or {{"feature": 5, "text": '
            f"TEXT}}; got {type(value).__name__}",
            code="invalid_labels",
        )
    return {_feature(key, at): _label(one, at) for key, one in value.items()}


def _label(value: Any, at: str) -> FeatureLabel:
    try:
        return FeatureLabel.model_validate({"text": value} if isinstance(value, str) else value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "a label"
        raise FileFormatError(
            f"{at}: {where}: {first['msg']}; a label is a text, or an object with 'text'",
            code="invalid_labels",
        ) from None


def _feature(key: Any, at: str) -> int:
    text = str(key)
    if isinstance(key, bool) or not (text.isascii() and text.isdecimal() and len(text) < 10):
        raise FileFormatError(
            f"{at}: {text[:40]!r} is no number of a feature", code="invalid_labels"
        )
    return int(text)
