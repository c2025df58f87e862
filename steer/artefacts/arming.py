"""What arms detectors on a request, or on those of a profile: the `detectors` field, as JSON."""

from __future__ import annotations

from typing import Annotated, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from steer.spec import DetectorRef

MAX_ARMED = 16
"""Detectors of one request."""

ReadTokens: TypeAlias = Literal["prompt", "generated", "all"]
Action: TypeAlias = Literal["tag", "stop"]


class ArmedDetector(BaseModel):
    """A registered detector that watches the tokens of a request.

    `tag` says in the answer whether it fired; `stop` ends the answer as well, with the token on
    which it fired as the last one. It watches what is generated, unless `tokens` says otherwise,
    and fires above its own threshold, unless one is given.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: DetectorRef
    action: Action = "tag"
    tokens: ReadTokens = "generated"
    threshold: Annotated[float, Field(strict=True, allow_inf_nan=False)] | None = None


def parse_armed(text: str) -> ArmedDetector:
    """The detector that `name` or `name:action` arms. Raises `ValueError`."""
    name, colon, action = text.rpartition(":")
    fields = {"name": name, "action": action} if colon else {"name": text}
    try:
        return ArmedDetector.model_validate(fields)
    except ValidationError:
        raise ValueError(f"{text!r} arms no detector: write NAME, NAME:tag or NAME:stop") from None


ArmedDetectors: TypeAlias = Annotated[
    tuple[ArmedDetector, ...], Field(max_length=MAX_ARMED, fail_fast=True)
]
