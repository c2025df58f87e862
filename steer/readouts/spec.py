"""What a request asks to see of its tokens while it is answered: the `inspect` field, as JSON.

Like a steering spec it is frozen, refuses unknown fields, and knows no torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from steer.artefacts.arming import ReadTokens
from steer.errors import SpecError, Unsupported, pointer
from steer.model import Capabilities
from steer.spec import Index, LayersOrAll, Name

MAX_READINGS = 64
"""Entries of one list of a spec."""
MAX_TOP = 100

_Top: TypeAlias = Annotated[int, Field(strict=True, ge=1, le=MAX_TOP)]


READOUTS = ("projections", "features", "lens", "norms", "relative_size", "kl")
"""The fields of a `ReadoutSpec` that ask for something."""


def check_readable(fields: Sequence[str], able: Capabilities) -> None:
    """Raises `Unsupported` where an engine that is `able` cannot read one of `fields`."""
    missing = [name for name in fields if name not in able.readouts]
    if missing:
        raise Unsupported(
            f"the {able.engine} engine cannot read {missing[0]!r} while it answers: leave it out; "
            f"it reads {', '.join(able.readouts) or 'nothing'}",
            param=pointer(missing[0]),
            code="unsupported",
        )


class ProjectionSpec(BaseModel):
    """⟨x, v̂⟩ of a registered vector, on `layers`: those of its card, where none are given; with
    `"all"` those that it has rows for, or every layer where it has a single row."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    vector: Name
    layers: LayersOrAll | None = None


class FeatureSpec(BaseModel):
    """Activations of a registered SAE, at its own hook point: the `top` most active features of
    each token, or those of the named `features`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: Name
    top: _Top | None = None
    features: (
        Annotated[tuple[Index, ...], Field(min_length=1, max_length=256, fail_fast=True)] | None
    ) = None

    @model_validator(mode="after")
    def _one_way(self) -> Self:
        if self.top is not None and self.features is not None:
            raise ValueError("'top' ranks all features and 'features' names some: give one of them")
        return self


class LensSpec(BaseModel):
    """What `layers` would say next: the `top` tokens and the entropy, by the logit lens, or by a
    registered `lens`, tuned or Jacobian; `"all"` are those that the lens reads."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layers: LayersOrAll
    top: _Top = 5
    lens: Name | None = None


class ReadoutSpec(BaseModel):
    """What is read of each token; of the generated ones, unless `tokens` says otherwise.

    `norms` are layers, `relative_size` is ‖Δx‖/‖x‖ of the edits at each hook point that the
    steering edits, `kl` the divergence of the steered from the unsteered next-token distribution
    by which each generated token was chosen.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    projections: Annotated[tuple[ProjectionSpec, ...], Field(max_length=MAX_READINGS)] = ()
    features: Annotated[tuple[FeatureSpec, ...], Field(max_length=MAX_READINGS)] = ()
    lens: LensSpec | None = None
    norms: LayersOrAll | None = None
    relative_size: StrictBool = False
    kl: StrictBool = False
    tokens: ReadTokens = "generated"

    @property
    def asked(self) -> tuple[str, ...]:
        """The fields that ask for something."""
        return tuple(name for name in READOUTS if getattr(self, name))

    def check_asked(self) -> None:
        """Raises `SpecError` where nothing is asked for."""
        if not self.asked:
            raise SpecError(
                "'inspect' asks for nothing: give 'projections', 'features', 'lens', 'norms', "
                "'relative_size' or 'kl'",
                code="nothing_to_read",
            )
