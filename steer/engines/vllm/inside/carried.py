"""What a block makes at one of its hook points of states that stand at an earlier one.

The block runs by itself, through its own taps: where the tap of the first point is, the states take
the place of what is there, and at the tap of the other one what is there is taken out. Each state
is the only token of its sequence, which attends to itself: so what its attention makes is its own
values, over that token's share of the weight where sinks take a part.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.vllm.inside.alone import HandedRows, LayersAlone, ReachedError
from steer.engines.vllm.inside.weights import AttentionForm
from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.inner_sites import Shard
from steer.engines.vllm.taps.taps import ADDED, Halves, points_of, tap_of
from steer.errors import Unsupported
from steer.model import HookPoint, ModelInfo, forward_order
from steer.spec import Site

_CODE = "cannot_carry"


@dataclass(frozen=True)
class BlockStates:
    """Assumes what `LayersAlone` assumes.

    `shards` are the sites whose rows are split over workers; `tapped` holds the taps of a layer in
    place; `experts_apart` is whether the experts of a block are on several engines that run in step
    with one another: none of them may go through them by itself.
    """

    alone: LayersAlone
    shards: Mapping[Site, Shard]
    model: ModelInfo
    tapped: Callable[[int], AbstractContextManager[None]]
    experts_apart: bool = False

    @torch.inference_mode()
    def __call__(
        self, source: HookPoint, target: HookPoint, states: Float[Tensor, "N width"]
    ) -> Float[Tensor, "N width"] | None:
        """Float32; None where another worker has the layer. Raises `Unsupported` (`cannot_carry`)
        where the block does not run so."""
        layer = source.layer
        if layer not in self.alone.attention.owned:
            return None
        if self.experts_apart and forward_order(target) > forward_order(HookPoint(layer, "mlp_in")):
            raise Unsupported(
                f"behind its experts, which all data-parallel engines run together, layer {layer} "
                f"is not run by itself, so what it makes at {target} is not told",
                code=_CODE,
            )
        with self.tapped(layer):
            parts = [self._made(source, target, rows) for rows in self.alone.pieces(states)]
        return torch.cat(parts)

    def _made(self, source: HookPoint, target: HookPoint, states: Tensor) -> Tensor:
        layer, at_start = source.layer, source.site == "resid_pre"
        stream = states if at_start else states.new_zeros(len(states), self.model.d_model)
        placed = None if at_start else (source, states)
        visitor = _Placing(placed, target, self.model.n_layers, self.shards)
        attended = forward_order(source) < forward_order(HookPoint(layer, "head_out"))

        def attend(rows: HandedRows) -> None:
            _attend_alone(rows, self.alone.attention.layers[layer], layer, wanted=attended)

        ops.set_running(visitor)
        try:
            self.alone.run(
                layer, stream, attend, what=f"what it makes at {target} of {source} is", code=_CODE
            )
        finally:
            ops.set_running(None)
        return visitor.read


def _attend_alone(rows: HandedRows, attention: Any, layer: int, *, wanted: bool) -> None:
    """Writes what an attention makes where every token has itself alone to attend to; nothing of
    meaning where that is not `wanted`, because other states will take its place."""
    query, key, value, made = (rows[name] for name in ("query", "key", "value", "made"))
    assert made is not None
    if not wanted:
        made.zero_()
        return
    if query is None or key is None or value is None:
        raise Unsupported(
            f"the attention of layer {layer} is handed no keys and values of its own, so what the "
            "layer makes by itself is not told",
            code=_CODE,
        )
    share = AttentionForm.of(attention).alone(query.float(), key.float())
    values = value.float().repeat_interleave(query.shape[1] // value.shape[1], 1)
    made.copy_((share[..., None] * values).to(made.dtype))


class _Placing:
    """A `Visitor` of one block, which leaves it at `target`."""

    def __init__(
        self,
        placed: tuple[HookPoint, Tensor] | None,
        target: HookPoint,
        n_layers: int,
        shards: Mapping[Site, Shard],
    ) -> None:
        """`placed` are the states that take the place of what is at a point, where not the stream
        before the block is that."""
        self._placed, self._target, self._shards = placed, target, shards
        points = {target} if placed is None else {placed[0], target}
        self.taps = frozenset(tap_of(point) for point in points)
        self._points = {
            tap: [point for point in points_of(tap, n_layers) if point in points]
            for tap in self.taps
        }
        self.read = torch.empty(0)

    def visit(self, tap: int, hidden: Tensor, residual: Tensor | None) -> None:
        for point in self._points[tap]:
            if self._placed is not None and point == self._placed[0]:
                self._place(point, self._placed[1], (hidden, residual))
            if point == self._target:
                self.read = self._taken(point, (hidden, residual)).float().cpu()
                raise ReachedError

    def _place(self, point: HookPoint, states: Tensor, there: Halves) -> None:
        hidden, residual = there
        rows = states.to(hidden)
        if point.site in ADDED or residual is None:
            shard = self._shards.get(point.site)
            hidden.copy_(rows if shard is None else shard.own(rows))
        else:
            hidden.zero_()
            residual.copy_(rows)

    def _taken(self, point: HookPoint, there: Halves) -> Tensor:
        hidden, residual = there
        if point.site in ADDED or residual is None:
            shard = self._shards.get(point.site)
            return hidden if shard is None else shard.gather(hidden)
        return hidden.float() + residual.float()
