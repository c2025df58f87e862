"""The sites inside attention and MLP: what these parts read, and what their output projections do.

    attn_in, mlp_in      the input of attention and of the MLP, which is their norm's output
    head_out, mlp_act    the input of the matrix that makes what the part adds to the stream

So each is the input of a module that a layer's family names, and one tensor by itself: an edit of
it is an edit of what that module reads, and of nothing else. Under tensor parallelism the inputs of
output projections are split over the workers, each of which has its own heads and neurons.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from steer.engines.vllm.taps.arguments import STREAM, Argument, shown
from steer.spec import Site


@dataclass(frozen=True)
class InnerSite:
    """`site` is the input of the module `path` of each layer, in whole rows of `width`, which lie
    on so many `workers` in equal parts."""

    site: Site
    path: str
    width: int
    workers: int = 1

    def module(self, layer: nn.Module) -> nn.Module:
        """The module of `layer` that reads the site."""
        return layer.get_submodule(self.path)


@dataclass(frozen=True)
class Shard:
    """One worker's part of a row that lies on `workers` in equal parts.

    `gather` makes of the parts `[T, d / workers]` of all workers the rows `[T, d]`; every worker of
    the group has to call it, at the same tap of the same pass.
    """

    gather: Callable[[Tensor], Tensor]
    rank: int
    workers: int

    def own(self, rows: Tensor) -> Tensor:
        """This worker's part of `rows`."""
        return rows.chunk(self.workers, dim=-1)[self.rank]


def input_of(module: nn.Module) -> Argument:
    """The states among the arguments of `module`: those of that name, or else the first."""
    names = Argument.names(module)
    return Argument(module, STREAM if STREAM in names else names[0])


def show_input(module: nn.Module, tap: nn.Module) -> None:
    """Shows `tap` what `module` is about to read."""
    states, inner = input_of(module), module.forward

    def forward(*args: Any, **named: Any) -> Any:
        args, named = states.put(args, named, shown(tap, states.of(args, named)))
        return inner(*args, **named)

    module.steer_input_tap = tap
    module.forward = forward
