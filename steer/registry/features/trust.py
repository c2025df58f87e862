"""How purely a feature stands for a known concept: the finding of `steer sae trust`."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict

from steer.registry.features.findings import Finding


class Absorber(BaseModel):
    """A feature that fires in another's place, on so many of the held-out positives (`texts`), and
    the cosine of its decoder row with the concept's probe."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    feature: int
    texts: int
    cosine: float


class Absorption(BaseModel):
    """Where a concept is there and its features are silent (2409.14507).

    `features` stand for the concept together; of `texts` held-out positives that a probe of the
    states recognises, they are silent on the share `silent`, and on `rate` another feature carries
    the concept: `absorbers`, the one of most texts first.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    features: tuple[int, ...]
    texts: int
    probe: float
    silent: float
    rate: float
    absorbers: tuple[Absorber, ...]


class ConceptTrust(Finding):
    """The feature that tells the texts of `concept` from others best, and how purely. `present` is
    whether it fires on these texts, and not on the others.

    `fms` is the feature monosemanticity score FMS@p (2506.19382) for `p` removed features,
    `capacity` × (`local` + `widely`) / 2: the accuracy of this feature alone; how far it falls to
    chance without it; and how little others add. Accuracies are of held-out texts, half of them
    positive. `runners_up` are the features that tell them apart without it.
    """

    kept_as: ClassVar[str] = "trust"

    model: str
    concept: str
    present: bool
    texts: int
    p: int
    fms: float
    capacity: float
    local: float
    widely: float
    runners_up: tuple[int, ...]
    absorption: Absorption | None = None
