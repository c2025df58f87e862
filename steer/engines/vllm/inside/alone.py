"""Layers run by themselves, between two steps.

A layer is called as it was in a trial pass: given states stand in the place of the stream, every
token at the first position, without a cache. What its attention would do is done by whoever asks,
because there is nothing to attend to.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.vllm.inside.layers import AttentionLayers, LayerCall, handed
from steer.engines.vllm.seams import replaced
from steer.errors import EngineError, SteerError, Unsupported

HandedRows = Mapping[str, Tensor | None]
"""What an attention is handed, `[N, heads, head_dim]`: query, key and value, and `made`, the memory
for what it makes of them."""


class ReachedError(Exception):
    """What was asked for has been seen, and the layer need not go on."""


@dataclass(frozen=True)
class LayersAlone:
    """Those of this worker.

    Assumes: called between two steps, when nobody is steered; by all tensor-parallel workers at
    once. Whoever stops a layer does so at the same place on each of them.

    `calls` are how layers were called in a trial pass; `context` is what a pass without a cache
    runs in, and speaks with no other engine; `most` is how many tokens a pass may have;
    `without_adapters` says of that many coming rows that they are the model's own.
    """

    calls: Mapping[int, LayerCall]
    attention: AttentionLayers
    context: Callable[[], AbstractContextManager[Any]]
    without_adapters: Callable[[int], None]
    most: int

    @property
    def complete(self) -> bool:
        """Whether every layer of this worker can be run so."""
        return self.attention.owned == self.calls.keys()

    def pieces(self, states: Float[Tensor, "N d"]) -> Iterator[Float[Tensor, "n d"]]:
        """`states`, as many at a time as one pass may have."""
        yield from torch.split(states, self.most)

    @torch.inference_mode()
    def run(
        self,
        layer: int,
        stream: Float[Tensor, "n d_model"],
        attend: Callable[[HandedRows], None],
        *,
        what: str,
        code: str,
    ) -> None:
        """Runs `layer`, on this worker, over `stream` until someone raises `ReachedError`. `attend`
        is called in the place of what the layer's attention does, where it is one of vLLM's.

        Raises `Unsupported` (`code`) where the layer does not run so, which is why `what` is not
        told.
        """
        call, module = self.calls[layer], self.attention.layers.get(layer)
        args, named = _with(call, stream)
        with ExitStack() as stack:
            if module is not None:
                stack.enter_context(replaced(module.impl, "forward", _attending(module, attend)))
            self.without_adapters(len(stream))
            stack.enter_context(self.context())
            try:
                call.layer.forward(*args, **named)
            except ReachedError:
                return
            except SteerError:
                raise
            except Exception as error:
                raise Unsupported(
                    f"layer {layer} does not run by itself on this vLLM ({error!r}), so {what} "
                    "not told",
                    code=code,
                ) from error
        raise EngineError(f"layer {layer} ended without what was asked of it")


def _attending(module: Any, attend: Callable[[HandedRows], None]) -> Any:
    rows_of = handed(module.impl)

    def forward(*args: Any, **named: Any) -> Any:
        rows = rows_of(args, named)
        attend(rows)
        return rows["made"]

    return forward


def _with(call: LayerCall, states: Tensor) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of `call`, for `states`: they are the stream, and whatever else there is of
    each token is that of the first."""
    like = call.states.of(call.args, call.named)
    tokens = like.shape[-2]

    def of_all(value: Any) -> Any:
        if isinstance(value, Tensor):
            return _repeated(value, tokens, len(states))
        if isinstance(value, tuple | list):
            return type(value)(of_all(one) for one in value)
        return value

    args = tuple(of_all(one) for one in call.args)
    named = {name: of_all(one) for name, one in call.named.items()}
    # A copy: the layer may add to the stream in place.
    rows = states.to(like, copy=True).reshape(*like.shape[:-2], len(states), -1)
    if call.before is not None and isinstance(call.before.of(args, named), Tensor):
        args, named = call.before.put(args, named, torch.zeros_like(rows))
    return call.states.put(args, named, rows)


def _repeated(x: Tensor, tokens: int, count: int) -> Tensor:
    """What `x` has of the first of `tokens` tokens, `count` times; `x` where it has nothing of
    single tokens. Whole numbers are positions, and the first one is 0."""
    place = next((n for n in range(min(2, x.ndim)) if x.shape[n] == tokens), None)
    if place is None:
        return x
    sizes = [count if n == place else -1 for n in range(x.ndim)]
    first = x.narrow(place, 0, 1).expand(*sizes).contiguous()
    return first if first.is_floating_point() else torch.zeros_like(first)
