"""Where vLLM's decoder layers are tapped, and what a tap is in eager and in compiled engines.

Most of vLLM's models keep the residual stream as two tensors whose sum is the stream: what the last
part of the layer adds (`hidden`), and everything before it (`residual`). The two meet in the fused
add of the next norm. So a layer needs two taps, each just before such a norm, and they serve five
sites:

    tap 0          resid_pre of layer 0
    tap 2i + 1     attn_out, resid_mid of layer i      (between attention and MLP)
    tap 2i + 2     mlp_out, resid_post of layer i, resid_pre of layer i + 1

The sites inside attention and MLP have taps of their own, in front of the module that reads them
(`inner_sites.py`); these count down:

    tap −4i − 1    attn_in of layer i, and then head_out, mlp_in, mlp_act

Models that keep one tensor have the same two halves at the same places: a part's output, and the
stream that it is about to be added to. Where the halves are found is the family's `Layout`.

Taps replace the `forward` of single module instances after the weights are loaded and before the
first pass, so that torch.compile traces them; nothing is hooked into vLLM's classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.inner_sites import InnerSite, show_input
from steer.engines.vllm.taps.shifts import ShiftTables
from steer.model import INNER_SITES, SITE_ORDER, HookPoint
from steer.spec import Site

SITES: tuple[Site, ...] = ("resid_pre", "attn_out", "resid_mid", "mlp_out", "resid_post")
ADDED: frozenset[Site] = frozenset({"attn_out", "mlp_out"})
"""Sites that are a part's contribution, `hidden` alone; the others are the stream."""

_INNER: tuple[Site, ...] = tuple(INNER_SITES)

Halves = tuple[Tensor, Tensor | None]


def points_of(tap: int, n_layers: int) -> tuple[HookPoint, ...]:
    """The hook points at `tap`, in the order in which their edits run."""
    if tap < 0:
        layer, site = divmod(-1 - tap, len(_INNER))
        return (HookPoint(layer, _INNER[site]),)
    layer, part = divmod(tap - 1, 2)
    if part == 0:
        return (HookPoint(layer, "attn_out"), HookPoint(layer, "resid_mid"))
    after = () if layer + 1 == n_layers else (HookPoint(layer + 1, "resid_pre"),)
    if layer < 0:
        return after
    return (HookPoint(layer, "mlp_out"), HookPoint(layer, "resid_post"), *after)


def tap_of(point: HookPoint) -> int:
    """The tap that serves `point`."""
    if point.site in INNER_SITES:
        return -1 - len(_INNER) * point.layer - _INNER.index(point.site)
    if point.site == "resid_pre":
        return 2 * point.layer
    return 2 * point.layer + (1 if point.site in ("attn_out", "resid_mid") else 2)


def layer_of(tap: int) -> int:
    """The layer whose modules `tap` is in."""
    return (-1 - tap) // len(_INNER) if tap < 0 else max(tap - 1, 0) // 2


class EagerTap(nn.Module):
    """A tap of an engine without torch.compile: a look at the running pass, in Python."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Halves:
        running = ops.running  # asked here, which saves a call in every layer
        if running is not None and self.index in running.taps:
            running.visit(self.index, hidden, residual)
        return hidden, residual

    # Nobody hooks a tap, and a module's own call makes three of each.
    __call__ = forward


class OpaqueTap(nn.Module):
    """A tap as an operator that torch.compile does not look into.

    `static` operators launch a kernel over fixed buffers, which a CUDA graph replays
    (`static/form.py`), and where none is replayed look at the running pass as the others do, in
    Python.
    """

    def __init__(self, index: int, *, static: bool) -> None:
        super().__init__()
        self.index, self.static = index, static

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Halves:
        if residual is None:
            one = torch.ops.steer.edit_one if self.static else torch.ops.steer.visit_one
            one(hidden, self.index)
        else:
            pair = torch.ops.steer.edit_pair if self.static else torch.ops.steer.visit_pair
            pair(hidden, residual, self.index)
        return hidden, residual


class CompiledTap(nn.Module):
    """A tap inside a compiled graph.

    Constant additions are a gather and an add that fuse with the norm behind them: row 0 of the
    bank is −0.0, so that an unsteered token keeps its bits. Everything else happens in an opaque
    tap behind it. The constants go to `residual`: `hidden` may be the result of an all-reduce that
    vLLM fuses with the norm.
    """

    rows: Tensor
    bank: Tensor

    def __init__(self, index: int, shifts: ShiftTables, reach: nn.Module) -> None:
        """`reach` is the tap that does everything else."""
        super().__init__()
        self.reach = reach
        self.register_buffer("rows", shifts.token_rows[index], persistent=False)
        self.register_buffer("bank", shifts.bank, persistent=False)

    def forward(self, hidden: Tensor, residual: Tensor | None) -> Halves:
        shift = self.bank.index_select(0, self.rows[: hidden.shape[0]])
        if residual is None:
            hidden = (hidden.float() + shift).to(hidden.dtype)
        else:
            residual = (residual.float() + shift).to(residual.dtype)
        halves: Halves = self.reach(hidden, residual)
        return halves


@dataclass(frozen=True)
class LayerTaps:
    """The taps of one layer; `first` exists in layer 0 alone."""

    first: nn.Module | None
    middle: nn.Module
    last: nn.Module


class Layout(Protocol):
    """How a family's decoder layers carry the stream, and so where their taps go."""

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites at which an edit is exact."""

    def check(self, layer: nn.Module) -> str | None:
        """What is unexpected about `layer`; None where it is built as this layout says."""

    def install(self, layer: nn.Module, taps: LayerTaps) -> None:
        """Puts the taps of `layer` in place."""


@dataclass(frozen=True)
class DecoderStack:
    """The decoder layers that this worker owns, by their number in the whole model.

    `n_layers` counts those of all workers; `inner` are the sites inside attention and MLP that are
    tapped as well.
    """

    layers: Sequence[tuple[int, nn.Module]]
    layout: Layout
    n_layers: int
    inner: tuple[InnerSite, ...] = ()

    @property
    def sites(self) -> tuple[Site, ...]:
        """The sites that these layers have taps for, in forward order."""
        found = {*self.layout.sites, *(one.site for one in self.inner)}
        return tuple(sorted(found, key=SITE_ORDER.__getitem__))

    @property
    def taps(self) -> list[int]:
        """The taps in these layers: those of the stream, then those of the parts."""
        first = [0] if any(index == 0 for index, _ in self.layers) else []
        stream = [2 * index + part for index, _ in self.layers for part in (1, 2)]
        inner = [tap_of(HookPoint(n, one.site)) for n, _ in self.layers for one in self.inner]
        return first + stream + inner

    def owns(self, point: HookPoint) -> bool:
        """Whether the tap that serves `point` is in one of these layers."""
        return layer_of(tap_of(point)) in {index for index, _ in self.layers}

    def ends_before(self, point: HookPoint) -> bool:
        """Whether the tap that serves `point` is in a layer behind these."""
        return layer_of(tap_of(point)) > self.layers[-1][0]


def install(stack: DecoderStack, make_tap: Callable[[int], nn.Module]) -> None:
    """Puts the taps of every layer of `stack` in place."""
    for index, layer in stack.layers:
        for one in stack.inner:  # first, because the layout wraps what these look at
            show_input(one.module(layer), make_tap(tap_of(HookPoint(index, one.site))))
        first = make_tap(0) if index == 0 else None
        taps = LayerTaps(first, make_tap(2 * index + 1), make_tap(2 * index + 2))
        stack.layout.install(layer, taps)
