"""Which of vLLM's attentions belongs to which layer, and what it is handed while somebody asks.

vLLM calls the `forward` of an attention's `impl` in Python, from an operator that torch.compile
does not look into, with queries after the rotary embedding, keys and values, and memory for what it
makes. So a `forward` of the instance sees all of it. It is there for a pass in which a request
asks, and such passes run without their CUDA graph.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from torch import Tensor, nn

from steer.engines.base import Attention
from steer.engines.vllm.inside.notes import AttentionNotes
from steer.engines.vllm.inside.weights import AttentionForm, attention_of
from steer.engines.vllm.internals import ATTENTION
from steer.engines.vllm.seams import check, replaced
from steer.engines.vllm.taps.arguments import BEFORE, STREAM, Argument
from steer.engines.vllm.taps.decoder import TextDecoder
from steer.errors import EngineError, Unsupported

HANDED = ("query", "key", "value")
MADE = "output"
"""The names that these have among the parameters of an impl's `forward`."""


class AttendedRows(NamedTuple):
    """Of the coming pass the rows `offset` to `offset` + `length`, which stand at positions from
    `start` on, go into `notes`."""

    notes: AttentionNotes
    offset: int
    start: int
    length: int


@dataclass
class AttentionLayers:
    """The attentions of this worker's layers, by the number of the layer; of tensor-parallel
    workers each has heads of its own, those of rank `rank` of `ranks`.

    Assumes: one pass runs at a time, in one thread.
    """

    layers: Mapping[int, Any]
    owned: frozenset[int]
    """The layers that this worker has, with such an attention or without."""
    rank: int = 0
    ranks: int = 1
    _watched: ExitStack = field(default_factory=ExitStack)

    @property
    def complete(self) -> bool:
        """Whether what heads attend to can be told of every layer of this worker."""
        return self.owned == self.layers.keys()

    def notes(self, layers: Sequence[int], length: int) -> AttentionNotes:
        """For a request whose prompt has `length` tokens."""
        return AttentionNotes([layer for layer in layers if layer in self.owned], length)

    def watch(self, asked: Sequence[AttendedRows]) -> None:
        """In the coming pass attentions write down what `asked` are about."""
        self.rest()
        for layer in dict.fromkeys(layer for one in asked for layer in one.notes.layers):
            if layer in self.layers:
                wanting = [one for one in asked if layer in one.notes.layers]
                impl = self.layers[layer].impl
                noting = _noting(impl, layer, wanting)
                self._watched.enter_context(replaced(impl, "forward", noting))

    def rest(self) -> None:
        """Every attention is as it was before."""
        self._watched.close()

    def told(
        self, notes: AttentionNotes, positions: Sequence[int]
    ) -> Iterator[tuple[int, Attention]]:
        """What the heads here attended to, layer by layer. Raises `Unsupported` (`no_attention`)
        where that cannot be told, `EngineError` for tokens that no pass computed."""
        for layer, found in notes.layers.items():
            reason = notes.strange.get(layer)
            if layer not in self.layers:
                reason = "is not one of vLLM's that is handed queries, keys and values"
            if reason is not None:
                raise Unsupported(
                    f"the attention of layer {layer} {reason}, so what its heads attend to cannot "
                    "be told on vLLM",
                    code="no_attention",
                )
            if found is None or not bool(found.seen.all()):
                raise EngineError(f"not every token was seen by the attention of layer {layer}")
            form = AttentionForm.of(self.layers[layer])
            yield layer, attention_of(found, form, positions, layer)


def _noting(impl: Any, layer: int, asked: Sequence[AttendedRows]) -> Any:
    """The `forward` of `impl`, which also writes down what it is handed and what it makes."""
    forward, rows_of = impl.forward, handed(impl)

    def noted(*args: Any, **named: Any) -> Any:
        result = forward(*args, **named)
        rows = rows_of(args, named)
        for one in asked:
            place = slice(one.offset, one.offset + one.length)
            parts = {name: None if x is None else x[place] for name, x in rows.items()}
            one.notes.take(layer, one.start, parts)
        return result

    return noted


def handed(impl: Any) -> Callable[[tuple[Any, ...], Mapping[str, Any]], dict[str, Tensor | None]]:
    """What says of a call of `impl.forward` which rows `[T, heads, head_dim]` it is handed, and
    which it makes."""
    signature = inspect.signature(impl.forward)

    def rows_of(args: tuple[Any, ...], named: Mapping[str, Any]) -> dict[str, Tensor | None]:
        given = signature.bind(*args, **named).arguments
        query, made = given["query"], given[MADE]
        rows = {name: given[name] for name in HANDED}
        return {**rows, "made": made.view(len(query), query.shape[1], -1)}

    return rows_of


class LayerCall(NamedTuple):
    """A layer, what it was called with in a trial pass, and where in this the stream is: in
    `states`, or in the sum with `before`."""

    layer: nn.Module
    args: tuple[Any, ...]
    named: Mapping[str, Any]
    states: Argument
    before: Argument | None


class AttentionSearch:
    """Finds the attentions in trial passes: that of a layer is whose `impl` runs while the layer
    does."""

    def __init__(self, decoder: TextDecoder, modules: Mapping[str, Any]) -> None:
        """`modules` are those that vLLM's operators know by name."""
        check(*ATTENTION)
        self._decoder, self._modules = decoder, modules
        self._here: int | None = None
        self._halves = {number: _halves(layer) for number, layer in decoder.layers}
        self._seen: dict[int, dict[int, Any]] = {number: {} for number, _ in decoder.layers}
        self.calls: dict[int, LayerCall] = {}
        """How each layer was called first."""

    @contextmanager
    def looking(self) -> Iterator[None]:
        """Inside the block, passes are looked at."""
        with ExitStack() as stack:
            for number, layer in self._decoder.layers:
                self._mark(stack, number, layer)
            for module in self._modules.values():
                if _handed(module):
                    stack.enter_context(replaced(module.impl, "forward", self._watched(module)))
            yield

    def found(self, rank: int = 0, ranks: int = 1) -> AttentionLayers:
        """Those of layers that have one."""
        layers = {
            number: next(iter(seen.values()))
            for number, seen in self._seen.items()
            if len(seen) == 1
        }
        return AttentionLayers(layers, frozenset(self._seen), rank, ranks)

    def _mark(self, stack: ExitStack, number: int, layer: nn.Module) -> None:
        def enter(_: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
            self._here = number
            halves = self._halves[number]
            if halves is not None:
                self.calls.setdefault(number, LayerCall(layer, args, dict(named), *halves))

        def leave(*_: Any) -> None:
            self._here = None

        stack.callback(layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        stack.callback(layer.register_forward_hook(leave).remove)

    def _watched(self, module: Any) -> Any:
        forward = module.impl.forward

        def watched(*args: Any, **named: Any) -> Any:
            if self._here is not None:
                self._seen[self._here][id(module)] = module
            return forward(*args, **named)

        return watched


def _halves(layer: nn.Module) -> tuple[Argument, Argument | None] | None:
    """Where a layer is given the stream; None for one that no trial pass will accept."""
    names = Argument.names(layer)
    if STREAM not in names:
        return None
    return Argument(layer, STREAM), Argument(layer, BEFORE) if BEFORE in names else None


def _handed(module: Any) -> bool:
    """Whether `module` is an attention whose impl is handed queries, keys and values, and writes
    what it makes."""
    forward = getattr(getattr(module, "impl", None), "forward", None)
    if forward is None:
        return False
    return {*HANDED, MADE} <= {*inspect.signature(forward).parameters}
