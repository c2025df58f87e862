"""What is read of a model's weights."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.inspection.method import Finite
from steer.spec import Site


class NamedToken(BaseModel):
    """A token and its id."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    id: int


class ScoredToken(NamedToken):
    """A token with its score."""

    score: Finite


class ScoredPair(BaseModel):
    """What attending to `input` gives to the score of `output`; of the circuit `qk`, what a head
    looks at `input` with from `output`, before its weights are made."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    input: NamedToken
    output: NamedToken
    score: Finite


class TokenReading(BaseModel):
    """The tokens with the greatest scores and those with the least, strongest first.

    `writes` is a vector of the stream, whose scores are what it gives to the logits of a state of
    size 1; `norm` is its length, `site` where it is written. Of a head it is what it passes on of
    `input`; and `seeks` are the scores with which it looks at other tokens from `input`, put at
    `site`. `reads` are a neuron's activations by the tokens' embeddings, put at `site`.
    `standing` says by how many deviations the strongest of all tokens differs from the mean.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    what: Literal["writes", "reads", "seeks"]
    layer: int
    site: Site
    input: NamedToken | None = None
    norm: Finite | None = None
    standing: Finite
    most: tuple[ScoredToken, ...]
    least: tuple[ScoredToken, ...]


class HeadReading(BaseModel):
    """A head's scores over all pairs of tokens: their mean and deviation, the mean over pairs of a
    token with itself, and by how many deviations that lies above the other (`copying`). Of the
    circuit `qk`, where the head alone is asked for, `strongest` says by how many deviations the
    strongest pair lies from the mean, and `strongest_by_chance` the same where the head's keys are
    turned at random."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    head: int
    copying: Finite
    own: Finite
    mean: Finite
    deviation: Finite
    strongest: Finite | None = None
    strongest_by_chance: Finite | None = None


class WeightsResult(BaseModel):
    """`readings` of a neuron, a vector, or of what a head makes of `inputs`; `heads` has the head
    that is asked for, or all of a table; `most` and `least` are the head's strongest pairs of
    tokens. `by_chance` is the greatest standing among random directions: what a reading's
    `standing` is to be held against; of what a head `seeks`, among random queries.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.weights"] = "inspect.weights"
    model: str
    part: str
    readings: tuple[TokenReading, ...] = ()
    heads: tuple[HeadReading, ...] = ()
    most: tuple[ScoredPair, ...] | None = None
    least: tuple[ScoredPair, ...] | None = None
    by_chance: Finite | None = None
