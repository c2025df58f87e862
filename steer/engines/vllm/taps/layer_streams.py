"""The ways in which decoder layers carry the stream, and how each is tapped.

A layout changes the `forward` of single module instances. The wrappers are traced by
torch.compile: they hold no condition on a tensor's values. A tap of an eager engine edits the
tensors that it is shown; a tap of a compiled one returns others, which take their place.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steer.engines.vllm.taps.arguments import BEFORE, STREAM, Argument, rows_of, shown
from steer.engines.vllm.taps.taps import SITES, LayerTaps
from steer.spec import Site

ENDS: tuple[Site, ...] = ("resid_pre", "resid_post")


@dataclass(frozen=True)
class FusedAdd:
    """A layer from `(hidden, residual)` to `(hidden, residual)`; the stream is their sum.

    `middle` names the norm between attention and MLP, called with `(hidden, residual)`; None where
    `sites` are the layer's ends alone.
    """

    middle: str | None

    sites: tuple[Site, ...] = SITES

    def check(self, layer: nn.Module) -> str | None:
        return _lacks(layer, (STREAM, BEFORE), () if self.middle is None else (self.middle,))

    def install(self, layer: nn.Module, taps: LayerTaps) -> None:
        if self.middle is not None:
            _before_norm(getattr(layer, self.middle), taps.middle)
        hidden_at, residual_at = Argument(layer, STREAM), Argument(layer, BEFORE)
        inner, first, last = layer.forward, taps.first, taps.last

        def forward(*args: Any, **named: Any) -> Any:
            if first is not None:
                hidden, residual = first(hidden_at.of(args, named), residual_at.of(args, named))
                args, named = hidden_at.put(args, named, hidden)
                args, named = residual_at.put(args, named, residual)
            hidden, residual = inner(*args, **named)
            return last(hidden, residual)

        if first is not None:
            layer.steer_first_tap = first
        layer.steer_tap = last
        layer.forward = forward


@dataclass(frozen=True)
class PlainAdd:
    """A layer whose stream is one tensor, to which attention and then the MLP are added.

    `attention` and `mlp` name the modules whose outputs are added as they are; `middle` names the
    module that is given the stream between the two.
    """

    attention: str
    middle: str
    mlp: str

    sites: tuple[Site, ...] = SITES

    def check(self, layer: nn.Module) -> str | None:
        return _lacks(layer, (STREAM,), (self.attention, self.middle, self.mlp))

    def install(self, layer: nn.Module, taps: LayerTaps) -> None:
        stream: list[Tensor] = []  # what the next part is added to, while the layer runs
        _after_part(getattr(layer, self.attention), taps.middle, stream)
        _after_part(getattr(layer, self.mlp), taps.last, stream)
        _hold_input(getattr(layer, self.middle), stream)
        hidden_at, inner, first = Argument(layer, STREAM), layer.forward, taps.first

        def forward(*args: Any, **named: Any) -> Any:
            hidden = hidden_at.of(args, named)
            if first is not None:
                hidden = shown(first, hidden)
                args, named = hidden_at.put(args, named, hidden)
            stream.clear()
            stream.append(hidden)
            output = inner(*args, **named)
            stream.clear()
            return output

        if first is not None:
            layer.steer_first_tap = first
        layer.forward = forward


@dataclass(frozen=True)
class EndsOnly:
    """A layer of which only the ends are known, and that hands on the stream whole: its parts are
    scaled before they are added, run beside one another, or were not read."""

    sites: tuple[Site, ...] = ENDS

    def check(self, layer: nn.Module) -> str | None:
        return _lacks(layer, (STREAM,), ())

    def install(self, layer: nn.Module, taps: LayerTaps) -> None:
        hidden_at = Argument(layer, STREAM)
        inner, first, last = layer.forward, taps.first, taps.last

        def forward(*args: Any, **named: Any) -> Any:
            if first is not None:
                hidden = shown(first, hidden_at.of(args, named))
                args, named = hidden_at.put(args, named, hidden)
            output = inner(*args, **named)
            return _with_first(output, shown(last, _first(output)))

        if first is not None:
            layer.steer_first_tap = first
        layer.steer_tap = last
        layer.forward = forward


def _before_norm(norm: nn.Module, tap: nn.Module) -> None:
    """Shows `tap` what `norm` is about to add and normalise."""
    inner = norm.forward

    def forward(x: Tensor, residual: Tensor | None = None, *args: Any, **named: Any) -> Any:
        x, residual = tap(x, residual)
        return inner(x, residual, *args, **named)

    norm.steer_tap = tap
    norm.forward = forward


def _after_part(part: nn.Module, tap: nn.Module, stream: list[Tensor]) -> None:
    """Shows `tap` what `part` returns and the stream that it is about to be added to.

    The layer holds the stream itself, so an edit of it is written into the tensor.
    """
    inner = part.forward

    def forward(*args: Any, **named: Any) -> Any:
        output = inner(*args, **named)
        added, before = rows_of(_first(output)), rows_of(stream[0])
        new_added, new_before = tap(added, before)
        if new_before is not before:
            before.copy_(new_before)
        if new_added is added:
            return output
        return _with_first(output, new_added.view_as(_first(output)))

    part.steer_tap = tap
    part.forward = forward


def _hold_input(module: nn.Module, stream: list[Tensor]) -> None:
    """Keeps what `module` is given as the stream that the next part is added to."""
    inner = module.forward

    def forward(x: Tensor, *args: Any, **named: Any) -> Any:
        stream.clear()
        stream.append(x)
        return inner(x, *args, **named)

    module.forward = forward


def _first(output: Any) -> Tensor:
    """The tensor in what a module returns, or the first of several."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first


def _with_first(output: Any, first: Tensor) -> Any:
    return first if isinstance(output, Tensor) else (first, *output[1:])


def _lacks(layer: nn.Module, parameters: tuple[str, ...], parts: tuple[str, ...]) -> str | None:
    takes = Argument.names(layer)
    if not set(parameters) <= set(takes):
        return f"forward takes {', '.join(takes)} and not {', '.join(parameters)}"
    missing = [name for name in parts if not isinstance(getattr(layer, name, None), nn.Module)]
    return f"there is no {', '.join(missing)}" if missing else None
