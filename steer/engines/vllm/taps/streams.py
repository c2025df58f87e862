"""What decoder layers take and return, proven in trial passes before anything is tapped.

A layer of vLLM's hands on the residual stream whole, or as two halves `(hidden, residual)` whose
sum it is; some return a `residual` beside a whole stream that nobody reads. Signatures do not tell
these apart, so three passes over the same tokens do:

    plain      each layer is given what the layer before it returned, and nothing else
    swapped    every reader of a pair is given (residual, hidden): the same bits, if it adds them
    forged     every reader of a pair is given another residual: the same bits, if nobody reads it

Swapping also finds halves that are not yet summed over a tensor-parallel group, and shapes find
streams that are split over one or are several. The passes run uncompiled and, as when vLLM measures
its memory, without a cache: mixers then leave their results unwritten, and those are made zero.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from steer.engines.proof import unchanged
from steer.engines.vllm.taps.arguments import BEFORE, STREAM, Argument, rows_of
from steer.engines.vllm.taps.decoder import TextDecoder, class_path, failure, unsupported
from steer.engines.vllm.taps.ending import Ending, find_ending
from steer.engines.vllm.taps.taps import Halves
from steer.errors import SteerError

TrialPass = Callable[[int], Tensor]
"""A dummy pass over so many tokens, before anything is compiled: what this worker makes of them,
`[T, ...]`."""

Change = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

TRIAL_TOKENS = 5
"""Not 3 or 4: rotary positions of images have that many rows, `[3, T]`, and which dimension of an
argument counts tokens is told by its size (`inside/alone.py`)."""
_UNWRITTEN = {torch.empty, torch.empty_like, torch.empty_strided, Tensor.new_empty}


@dataclass(frozen=True)
class Streams:
    """`halves` is whether the stream is the sum of two tensors, None where this worker has too few
    layers to tell; `ending` is what comes after the last layer, None where that is elsewhere or is
    not a norm."""

    halves: bool | None
    ending: Ending | None


@torch.inference_mode()
def read_streams(
    decoder: TextDecoder, run: TrialPass, *, width: int, largest: int, experts: bool
) -> Streams:
    """Raises `Unsupported` naming the first layer whose stream `[T, width]` cannot be told.

    `largest` is the most tokens that one pass may have; `experts` is whether the model is a mixture
    of experts.
    """
    for number, layer in decoder.layers:
        if STREAM not in Argument.names(layer):
            takes = ", ".join(Argument.names(layer))
            raise _refused(decoder, number, layer, f"takes {takes} and not {STREAM}")
    tokens = min(largest, TRIAL_TOKENS)
    trials = [_Trial(decoder, change) for change in (_keep, _swap, _forge)]
    plain, swapped, forged = (trial.run(run, tokens) for trial in trials)
    calls = trials[0]
    calls.check_shapes(rows=len(plain), width=width)
    calls.check_scale()
    halves: bool | None = False
    if calls.hands_pairs:
        halves = unchanged(swapped, plain, experts=experts)
        if not halves and not unchanged(forged, plain, experts=experts):
            raise unsupported(
                decoder.model,
                f"its layers ({kinds(decoder)}) hand on ({STREAM}, {BEFORE}), and the stream is "
                "neither the sum of the two nor the first alone",
            )
    elif calls.returns_pairs:
        halves = None
    calls.check_handed_on(residual=bool(halves))
    return Streams(halves, calls.ending(plain))


def kinds(decoder: TextDecoder) -> str:
    """The classes of the layers of `decoder`, for a message."""
    return ", ".join(sorted({class_path(layer) for _, layer in decoder.layers}))


class _Trial:
    """One pass, with all calls of the layers; whoever is given a pair is given what `change` makes
    of it."""

    def __init__(self, decoder: TextDecoder, change: Change) -> None:
        self._decoder, self._change = decoder, change
        self._order: list[int] = []
        self._given: list[Halves] = []
        self._returned: list[Halves] = []
        self._after: list[tuple[nn.Module, Tensor]] = []
        """What runs after the last layer and is given a state like the stream, with that state."""

    def run(self, run: TrialPass, tokens: int) -> Tensor:
        """What the pass makes of `tokens` tokens, float32 `[T, ...]`."""
        with ExitStack() as stack:
            stack.enter_context(uncompiled(self._decoder.model))
            stack.enter_context(ZeroedMemory())
            for number, layer in self._decoder.layers:
                stack.enter_context(self._watched(number, layer))
            for module in _beside(self._decoder):
                stack.callback(module.register_forward_pre_hook(self._see_after).remove)
            try:
                made = run(tokens).float()
            except SteerError:
                raise
            except Exception as error:
                raise unsupported(
                    self._decoder.model,
                    "vLLM could not run it without a cache, which is how Steer finds out what its "
                    f"layers hand on ({failure(error)})",
                ) from error
        self._check_order()
        return made

    @property
    def returns_pairs(self) -> bool:
        return any(residual is not None for _, residual in self._returned)

    @property
    def hands_pairs(self) -> bool:
        """Whether anyone is given a pair: a layer, or what comes after the last one."""
        last = self._decoder.ends_here and self._returned[-1][1] is not None
        return last or any(residual is not None for _, residual in self._given)

    def check_shapes(self, *, rows: int, width: int) -> None:
        """Raises `Unsupported` for a stream that is not one state of `width` for each token."""
        for (number, layer), halves in zip(self._decoder.layers, self._returned, strict=True):
            for half in halves:
                if half is not None and tuple(rows_of(half).shape) != (rows, width):
                    raise _refused(
                        self._decoder,
                        number,
                        layer,
                        f"makes a tensor {list(half.shape)} of {rows} tokens, and not one state of "
                        f"{width} numbers for each",
                    )

    def check_scale(self) -> None:
        """Raises `Unsupported` for float16 in models that then divide their stream (DeepSeek's)."""
        for number, layer in self._decoder.layers:
            factor = getattr(layer, "routed_scaling_factor", 1)
            if self._returned[0][0].dtype == torch.float16 and factor != 1:
                raise _refused(
                    self._decoder,
                    number,
                    layer,
                    f"divides the stream by {factor!r} in float16, so that states and strengths "
                    "have another scale: start vLLM with --dtype bfloat16",
                )

    def check_handed_on(self, *, residual: bool) -> None:
        """Raises `Unsupported` where a layer is given another stream than was returned; `residual`
        is whether that is a part of it."""
        steps = zip(self._decoder.layers[1:], self._given[1:], self._returned, strict=False)
        for (number, layer), given, returned in steps:
            same = _same(given[0], returned[0])
            if not same or (residual and not _same(given[1], returned[1])):
                raise _refused(
                    self._decoder,
                    number,
                    layer,
                    f"is not given what layer {number - 1} returned: the model changes the stream "
                    "between layers",
                )

    def ending(self, made: Tensor) -> Ending | None:
        """How the result of the pass, `made`, comes out of the last stream."""
        hidden, residual = self._returned[-1]
        streams = [hidden] if residual is None else [hidden, hidden + residual]
        for module, state in self._after if self._decoder.ends_here else ():
            for stream in streams if _same(state, hidden) else ():
                ending = find_ending(module, rows_of(stream), made)
                if ending is not None:
                    return ending
        return None

    @contextmanager
    def _watched(self, number: int, layer: nn.Module) -> Iterator[None]:
        hidden_at = Argument(layer, STREAM)
        residual_at = Argument(layer, BEFORE) if BEFORE in Argument.names(layer) else None

        def before(_: nn.Module, args: Any, named: Any) -> Any:
            hidden = hidden_at.of(args, named)
            residual = None if residual_at is None else residual_at.of(args, named)
            if not self._order:
                hidden = hidden + _stir(hidden)
            if residual_at is not None and residual is not None:
                hidden, residual = self._change(hidden, residual)
                args, named = residual_at.put(args, named, residual)
            args, named = hidden_at.put(args, named, hidden)
            self._order.append(number)
            self._given.append(_copied(hidden, residual))
            return args, named

        def after(_: nn.Module, __: Any, output: Any) -> Any:
            hidden, residual, *rest = _parts(self._decoder, number, layer, output)
            self._returned.append(_copied(hidden, residual))
            if residual is None or number != self._decoder.n_layers - 1:
                return output
            return (*self._change(hidden, residual), *rest)

        handles = (
            layer.register_forward_pre_hook(before, with_kwargs=True),
            layer.register_forward_hook(after),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _see_after(self, module: nn.Module, args: Any) -> None:
        done = len(self._returned) == len(self._decoder.layers)
        if done and args and isinstance(args[0], Tensor):
            self._after.append((module, args[0].clone()))

    def _check_order(self) -> None:
        numbers = [number for number, _ in self._decoder.layers]
        if self._order != numbers:
            raise unsupported(
                self._decoder.model,
                f"one forward pass runs its layers in the order {self._order} and not {numbers}",
            )


def _parts(decoder: TextDecoder, number: int, layer: nn.Module, output: Any) -> tuple[Any, ...]:
    """What a layer returns, as `(hidden, residual or None)`."""
    if isinstance(output, Tensor):
        return (output, None)
    known = isinstance(output, tuple) and 1 <= len(output) <= 2
    if known and all(one is None or isinstance(one, Tensor) for one in output[1:]):
        return (output[0], output[1] if len(output) == 2 else None)
    told = [type(one).__name__ for one in output] if isinstance(output, tuple) else type(output)
    raise _refused(decoder, number, layer, f"returns {told}, which is neither a stream nor a pair")


def _refused(decoder: TextDecoder, number: int, layer: nn.Module, reason: str) -> Exception:
    return unsupported(decoder.model, f"its layer {number}, {class_path(layer)}, {reason}")


def _keep(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return hidden, residual


def _swap(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    if hidden.dtype == residual.dtype:
        return residual.clone(), hidden.clone()
    return torch.zeros_like(hidden), residual + hidden


def _forge(hidden: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
    return hidden, -1 - residual


def _stir(hidden: Tensor) -> Tensor:
    """Another number for each coordinate: dummy inputs may be zero, and say nothing."""
    places = torch.arange(hidden.shape[-1], device=hidden.device, dtype=torch.float32)
    return torch.cos(places).to(hidden.dtype)


def _copied(hidden: Tensor, residual: Tensor | None) -> Halves:
    return hidden.clone(), None if residual is None else residual.clone()


def _same(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is other
    return torch.equal(rows_of(one), rows_of(other))


def _beside(decoder: TextDecoder) -> Iterator[nn.Module]:
    """The modules of the model that neither are in a layer nor hold one."""
    inside = {one for _, layer in decoder.layers for one in layer.modules()}
    for module in decoder.model.modules():
        if not any(one in inside for one in module.modules()):
            yield module


class ZeroedMemory(TorchFunctionMode):
    """Tensors made without values are zero, so that two passes over the same tokens are equal."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        return made.zero_() if func in _UNWRITTEN else made


@contextmanager
def uncompiled(model: nn.Module) -> Iterator[None]:
    """vLLM's own switch, for parts that are to be compiled and are not yet."""
    switched = [one for one in model.modules() if getattr(one, "do_not_compile", None) is False]
    for module in switched:
        module.do_not_compile = True  # type: ignore[assignment]
    try:
        yield
    finally:
        for module in switched:
            module.do_not_compile = False  # type: ignore[assignment]
