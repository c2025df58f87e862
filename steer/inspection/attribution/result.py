"""What an attribution answers: the parts of a logit."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.inspection.method import Finite


class AttributedToken(BaseModel):
    """A token whose logit is taken apart, and that logit, a soft cap included."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    token: str
    id: int
    logit: Finite


class LayerShare(BaseModel):
    """What one block's parts give to the logit.

    `rest` is what the block's stream gains beside its attention and MLP: rounding, and what
    steering adds to the stream itself. `heads` and `head_bias`, what the attention adds beside its
    heads, sum to `attention`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    attention: Finite
    mlp: Finite
    rest: Finite
    heads: tuple[Finite, ...] | None = None
    head_bias: Finite | None = None


class NeuronShare(BaseModel):
    """What one MLP neuron gives to the logit, and its activation before the output projection."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    neuron: int
    activation: Finite
    share: Finite


class AttributionResult(BaseModel):
    """`logit` is that of `token`, or its difference to that of `against`, before a soft cap.

    It is the sum of `constant` (what the head says of no state: its biases), `embedding`, the
    parts of `layers` and `unexplained`, which is rounding. `neurons` are parts of their layers'
    MLPs, the greatest first. `cap` is the soft cap that the model's own logits go through.
    `fingerprint` names the steering under which the states were read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.attribution"] = "inspect.attribution"
    model: str
    tokens: tuple[str, ...]
    position: int
    token: AttributedToken
    against: AttributedToken | None = None
    logit: Finite
    cap: Finite | None = None
    constant: Finite
    embedding: Finite
    layers: tuple[LayerShare, ...]
    neurons: tuple[NeuronShare, ...] | None = None
    unexplained: Finite
    fingerprint: str | None = None
