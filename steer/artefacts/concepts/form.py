"""What the card of a probe says: what it is asked for, where it reads, and how well it does."""

from __future__ import annotations

from typing import Annotated, TypeAlias

from pydantic import BaseModel, ConfigDict, Field

DIMENSIONS = 4096
LEAST_EXAMPLES = 10
"""The fewest that teach and try a probe."""
MOST_NAMES = 16_384
"""The most roles, or fillers, that one probe knows."""

ConceptName: TypeAlias = Annotated[str, Field(min_length=1, max_length=128)]
Share: TypeAlias = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
_Names: TypeAlias = Annotated[
    tuple[ConceptName, ...], Field(min_length=1, max_length=MOST_NAMES, fail_fast=True)
]


class _FormPart(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class RoleAccuracy(_FormPart):
    """How often the filler of `role` is found first among all fillers, over `pairs` of held-out
    texts: by the probe, by one whose training texts were given others' pairs (`shuffled`), and by
    saying the role's commonest filler (`commonest`). `unseen` more pairs have a filler that no
    training text has, and are left out."""

    role: str
    pairs: int
    unseen: int
    accuracy: Share | None = None
    shuffled: Share | None = None
    commonest: Share | None = None


class ProbeMeasures(_FormPart):
    """How a probe did: `trained` texts taught it, `held_out` others tried it. The shares are over
    all of their pairs; `roles` has them for each role (see `RoleAccuracy`)."""

    trained: Annotated[int, Field(ge=1)]
    held_out: Annotated[int, Field(ge=1)]
    accuracy: Share | None = None
    shuffled: Share | None = None
    commonest: Share | None = None
    roles: Annotated[tuple[RoleAccuracy, ...], Field(max_length=MOST_NAMES, fail_fast=True)] = ()


class ProbeForm(_FormPart):
    """The names that a probe was taught, and how states become its input.

    Names' codes have `dimensions` channels and are drawn by `seed`. A state's layers are summed up
    by `clusters` clusters; the token at `position` is read where nobody says another: an index, or
    a piece of the prompt.
    """

    roles: _Names
    fillers: _Names
    dimensions: Annotated[int, Field(strict=True, ge=256, le=16_384)] = DIMENSIONS
    clusters: Annotated[int, Field(strict=True, ge=1, le=64)] = 5
    position: (
        Annotated[int, Field(strict=True)] | Annotated[str, Field(min_length=1, max_length=4096)]
    ) = -1
    seed: Annotated[int, Field(strict=True, ge=0, lt=1 << 31)] = 0
    measures: ProbeMeasures | None = None
