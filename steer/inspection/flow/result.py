"""What a flow answers: a graph of what heads carry from token to token."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.inspection.attribution.result import AttributedToken
from steer.inspection.method import Finite
from steer.inspection.next_token import TokenChance
from steer.inspection.weights.result import ScoredToken


class FlowNode(BaseModel):
    """A state of the stream, or what an MLP adds to it, at one position.

    A `residual` is the stream after block `layer`, an `embedding` the stream before block 0; their
    `says` are the next tokens that the stream, read by the model's head, is likeliest to say. Of an
    `mlp`, `writes` are the tokens whose logits it raises most. `share` is its product with the
    direction of the token that is followed at this position, in logits; it is missing where a state
    is only read from.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    id: str
    part: Literal["embedding", "residual", "mlp"]
    layer: int
    position: int
    share: Finite | None = None
    says: tuple[TokenChance, ...] = ()
    writes: tuple[ScoredToken, ...] = ()


class FlowEdge(BaseModel):
    """What one head reads at the token `reads` and adds to the stream at `position`.

    `source` and `target` are the ids of the residual nodes before and after the block. `weight` is
    what the head attends there with, `share` what this gives to the logit that is followed at
    `position`, `norm` its length in the stream. `writes` are the tokens whose logits it raises
    most, in logits of a state of size 1; those of the head's value there are the same over
    `weight`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str
    target: str
    layer: int
    head: int
    reads: int
    position: int
    weight: Finite
    share: Finite
    norm: Finite
    writes: tuple[ScoredToken, ...]


class HeadFlow(BaseModel):
    """All that one head adds at a position, over the tokens that it reads: a share of the logit,
    and the tokens whose logits it raises most."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    head: int
    position: int
    share: Finite
    writes: tuple[ScoredToken, ...]


class LayerFlow(BaseModel):
    """How a block's shares come together: its `attention` is the shares of its edges, plus
    `left_out`, those of edges that are not in the answer, plus `bias`, what the attention adds
    whatever is read. `rest` is what the stream gains beside attention and MLP: steering, and
    rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    attention: Finite
    mlp: Finite
    rest: Finite
    bias: Finite
    left_out: Finite


class FollowedToken(BaseModel):
    """The logit of `token` after `position`, before a soft cap: the sum of `constant`, `embedding`,
    the attention, MLP and rest of all `layers`, and `unexplained`, which is rounding."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    position: int
    token: AttributedToken
    logit: Finite
    constant: Finite
    embedding: Finite
    unexplained: Finite
    layers: tuple[LayerFlow, ...]


class FlowResult(BaseModel):
    """`followed` has one entry for each position that was asked for; `edges` are the strongest into
    each of these positions, by the size of their shares, the strongest first.

    At a position a residual node goes on into the next layer's, and an MLP's node into that of its
    own layer; `nodes` are those of the positions asked for and those that edges come from.
    `heads` are the heads that the edges belong to. `cap` is the soft cap of the model's own logits.
    `fingerprint` names the steering under which the states were read.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.flow"] = "inspect.flow"
    model: str
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    followed: tuple[FollowedToken, ...]
    nodes: tuple[FlowNode, ...]
    edges: tuple[FlowEdge, ...]
    heads: tuple[HeadFlow, ...]
    cap: Finite | None = None
    fingerprint: str | None = None


def stream_id(layer: int, position: int) -> str:
    """The id of the node of the stream after block `layer`; -1 is before block 0."""
    return f"embedding@{position}" if layer < 0 else f"residual.{layer}@{position}"


def mlp_id(layer: int, position: int) -> str:
    return f"mlp.{layer}@{position}"
