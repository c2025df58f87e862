"""A head's output taken apart by the tokens that it attends to.

At token p head h adds W_h Σ_j a_hj v_hj to the stream: a_hj is how far it attends to token j, v_hj
its value there, W_h its part of the output projection, behind which a norm may come. So the part of
token j is a_hj W_h v_hj, and the parts sum to what the head adds.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import Attention, Engine
from steer.errors import Unsupported
from steer.inspection.attribution.parts import ProjectedPart, projected
from steer.model import HookPoint

_TOLERANCE = 1e-4
_TOLERANCE_HALF = 3e-2
"""How far, relative to its length, `head_out` may be from weights times values, in 32 bits and in
16."""


@dataclass(frozen=True)
class OutputProjection:
    """The matrix behind a layer's `head_out`, float64 `[width, d_model]`, without its bias."""

    matrix: Float[Tensor, "width d_model"]

    @staticmethod
    def of(engine: Engine, layer: int) -> OutputProjection:
        point = HookPoint(layer, "head_out")
        width = engine.info.width("head_out")
        units = torch.cat([torch.zeros(1, width), torch.eye(width)])
        made = projected(engine, point, units)
        return OutputProjection(made[1:] - made[0])


@dataclass(frozen=True)
class HeadsAt:
    """The heads of one layer at one position p.

    `weights` `[heads, p + 1]` and `values` `[heads, p + 1, head_dim]` are what they attend with
    and to; `part` says what becomes of it in the stream; all float64. `position` is p.
    """

    layer: int
    position: int
    weights: Float[Tensor, "heads tokens"]
    values: Float[Tensor, "heads tokens head_dim"]
    part: ProjectedPart
    out: OutputProjection

    @staticmethod
    def of(
        engine: Engine,
        attention: Attention,
        position: int,
        part: ProjectedPart,
        out: OutputProjection,
    ) -> HeadsAt:
        """Of `attention`, which begins with the first token.

        Raises `Unsupported` (`unsupported_inspection`) where weights times values are not what the
        heads give.
        """
        seen = position + 1
        weights = attention.weights[:, position, :seen].double()
        values = attention.values[:, :seen].double()
        made = torch.einsum("ht,htd->hd", weights, values).flatten()
        single = engine.info.dtype in ("float32", "float64")
        allowed = (_TOLERANCE if single else _TOLERANCE_HALF) * part.state.norm()
        if made.shape != part.state.shape or (made - part.state).norm() > allowed:
            raise Unsupported(
                f"what the heads of layer {part.point.layer} give is not what they attend to times "
                "its values: the model does something in between, such as a gate, so that a head's "
                "output has no parts by token",
                code="unsupported_inspection",
            )
        return HeadsAt(part.point.layer, position, weights, values, part, out)

    @property
    def _by_head(self) -> Float[Tensor, "heads head_dim d_model"]:
        heads, _, width = self.values.shape
        return self.out.matrix.reshape(heads, width, -1)

    def shares(self, direction: Float[Tensor, " d_model"]) -> Float[Tensor, "heads tokens"]:
        """The product of each head's part of each token with `direction`."""
        along = self._by_head @ (self.part.gain * direction)
        return self.weights * torch.einsum("htd,hd->ht", self.values, along)

    def written(self, heads: list[int], tokens: list[int]) -> Float[Tensor, "N d_model"]:
        """What each of `heads` adds to the stream of the token beside it in `tokens`."""
        read = self.weights[heads, tokens, None] * self.values[heads, tokens]
        return self.part.gain * torch.einsum("nd,ndm->nm", read, self._by_head[heads])

    def whole(self, heads: list[int]) -> Float[Tensor, "N d_model"]:
        """All that each of `heads` adds to the stream."""
        read = torch.einsum("ht,htd->hd", self.weights[heads], self.values[heads])
        return self.part.gain * torch.einsum("nd,ndm->nm", read, self._by_head[heads])

    @property
    def bias(self) -> Float[Tensor, " d_model"]:
        """What the attention adds whatever is read."""
        return self.part.gain * self.part.bias
