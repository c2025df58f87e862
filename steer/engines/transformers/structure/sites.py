"""Finds the sites of a decoder block by interventions, not by names or by comparing sums.

The block is run again on a stream of small whole numbers, while stand-ins return small whole
numbers for some of its modules. Every dtype adds those exactly, so that what is asked has a yes or
no to the bit, however large the model's own stream is and whatever its weights are:

- `attn_out`, `mlp_out`: two children whose outputs are added, as they are, to the block's input,
  and whose sum is its output. The first is the attention, or the module that takes what the
  attention returns; the second computes each token by itself.
- `resid_mid`: the first child whose input is the block's input plus `attn_out`, and at which a
  change of that tensor moves the output by as much.
- `head_out`, `mlp_act`: the inputs of the weight matrices whose outputs are, as they are, what the
  attention and the MLP return.
- `attn_in`, `mlp_in`: the outputs of children without a weight matrix that read the stream, which
  the attention, or the MLP, takes as they are, and which nothing else sees.

A site that nothing satisfies is left out, so parallel residuals, sandwich norms and mixtures of
experts are described as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from steer.engines.transformers.structure.calls import (
    Call,
    first_tensor,
    given_tensor,
    returning,
    standing_in,
    watching,
    with_tensor,
)
from steer.spec import Site

Side = Literal["input", "output"]

_LARGEST = 8
"""Of the whole numbers: four of them add up to what bfloat16 holds exactly (256), with room."""

_MIXES = {torch.float32: 1e-3, torch.float64: 1e-3}
_MIXES_HALF = 3e-2
"""Relative change of a token's row by another token, above the rounding of an expert's batch."""


@dataclass(frozen=True)
class HookTarget:
    """Where a hook point's tensor passes: a module's first input or its (first) output.

    `in_place` marks a stream that the block reads again beside this module: the edit must be
    written into the tensor itself.
    """

    module: nn.Module
    side: Side
    in_place: bool = False


def sites_of_block(block: nn.Module, seen: Mapping[nn.Module, Call]) -> dict[Site, HookTarget]:
    """The sites of `block`, from its call in `seen`, a plain pass of the whole model.

    Assumes: the model is in eval mode, without gradients.
    """
    call = seen.get(block)
    if call is None or call.input is None or call.output is None:
        return {}
    sites: dict[Site, HookTarget] = {
        "resid_pre": HookTarget(block, "input"),
        "resid_post": HookTarget(block, "output"),
    }
    if call.input.shape == call.output.shape:
        sites.update(_Trials(block, call, seen).sites())
    return sites


class _Trials:
    """Runs of one block on small whole numbers, with stand-ins for some of its modules."""

    def __init__(self, block: nn.Module, call: Call, seen: Mapping[nn.Module, Call]) -> None:
        assert call.input is not None
        self.block, self.call = block, call
        self.stream = _whole_numbers(call.input, 0)
        # What runs twice, here or in another block, would be hooked twice.
        self.calls = {m: seen[m] for m in block.modules() if m in seen and seen[m].times == 1}
        self.children = sorted(
            (c for c in block.children() if c in self.calls and self._fits(c)),
            key=lambda c: self.calls[c].order,
        )
        self.attention = next((c for c in self.children if attends(c)), None)

    def sites(self) -> dict[Site, HookTarget]:
        """The sites inside the block."""
        pair = self._summands()
        if pair is None:
            return {}
        first, second = pair
        sites: dict[Site, HookTarget] = {"mlp_out": HookTarget(second, "output")}
        middle = self._middle(first, second)
        if middle is not None:
            sites["resid_mid"] = HookTarget(middle, "input", in_place=True)
        mlp = self._sources(second)
        projections: dict[Site, list[nn.Module]] = {"mlp_act": mlp}
        if self.attention is not None:
            sites["attn_out"] = HookTarget(first, "output")
            projections["head_out"] = [self.attention]
        for site, owners in projections.items():
            projection = next(filter(None, map(self._projection, owners)), None)
            if projection is not None:
                sites[site] = HookTarget(projection, "input")
        return sites | self._norms(first, second)

    def _norms(self, first: nn.Module, second: nn.Module) -> dict[Site, HookTarget]:
        """The norms that the attention and the MLP read, where they alone do."""
        made = {first: self._numbers(first, 1), second: self._numbers(second, 2)}
        out, calls = self._run(made)
        streams = (self.stream.float(), self.stream.float() + made[first].float())
        sites: dict[Site, HookTarget] = {}
        for child in self.children:
            read = calls[child].input if child in calls else None
            if (
                child in made
                or _mixes_channels(child)
                or not any(_is(read, one) for one in streams)
            ):
                continue
            without, _ = self._run({**made, child: self._numbers(child, 3)})
            readers = self._readers(child)
            if not readers or not torch.equal(without, out):
                continue
            if readers == {self.attention}:
                sites["attn_in"] = HookTarget(child, "output")
            elif self.attention not in readers:
                sites["mlp_in"] = HookTarget(child, "output")
        return sites

    def _readers(self, source: nn.Module) -> set[nn.Module]:
        """The children that take what `source` returns as it is."""
        made = self._numbers(source, 3)
        _, calls = self._run({source: made})
        children = (child for child in self.block.children() if child in calls)
        return {child for child in children if _is(calls[child].input, made.float())}

    def _summands(self) -> tuple[nn.Module, nn.Module] | None:
        """The children whose outputs, added to the block's input, give its output."""
        for first in self.children:
            if not self._mixes_first(first):
                continue
            for second in self.children:
                if second is first or attends(second) or not self._adds(first, second):
                    continue
                if not self._mixes(second, {first: self._numbers(first, 1)}):
                    return first, second
        return None

    def _mixes_first(self, child: nn.Module) -> bool:
        """Whether `child` gives what the attention made of the tokens; without an attention, what
        another mixer of tokens did."""
        if self.attention is None:
            return self._mixes(child, {})
        return child is self.attention or self._passes(self.attention, child)

    def _adds(self, first: nn.Module, second: nn.Module) -> bool:
        a, b = self._numbers(first, 1), self._numbers(second, 2)
        out, _ = self._run({first: a, second: b})
        return torch.equal(out, self.stream.float() + a.float() + b.float())

    def _middle(self, first: nn.Module, second: nn.Module) -> nn.Module | None:
        """The first child that reads the stream between the summands, where a change of it stays
        in the stream."""
        a, b = self._numbers(first, 1), self._numbers(second, 2)
        wanted = self.stream.float() + a.float()
        _, calls = self._run({first: a, second: b})
        children = (c for c in self.block.children() if c in self.calls and c in calls)
        reading = (c for c in children if _is(calls[c].input, wanted))
        child = min(reading, key=lambda c: calls[c].order, default=None)
        if child is None:
            return None
        shift = _whole_numbers(self.stream, 3)

        def move(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = given_tensor(args, kwargs)
            assert given is not None
            given.add_(shift)

        handle = child.register_forward_pre_hook(move, with_kwargs=True)
        try:
            out, _ = self._run({first: a, second: b})
        finally:
            handle.remove()
        return child if torch.equal(out, wanted + b.float() + shift.float()) else None

    def _sources(self, summand: nn.Module) -> list[nn.Module]:
        """`summand`, and the children whose output it takes as it is: a norm's MLP."""
        before = [c for c in self.children if c is not summand and not attends(c)]
        return [summand, *(c for c in reversed(before) if self._passes(c, summand))]

    def _projection(self, owner: nn.Module) -> nn.Module | None:
        """The last weight matrix inside `owner`, where it alone makes what `owner` returns."""
        for module in _with_matrix(owner):
            call = self.calls.get(module)
            if call is None or call.output is None or call.input is None:
                continue
            if call.output.numel() != self.stream.numel() or not self._same_rows(call.input):
                continue
            made = _whole_numbers(call.output, 1)
            _, calls = self._run({module: made})
            if owner in calls and _is(calls[owner].output, made.float()):
                return module
        return None

    def _passes(self, source: nn.Module, target: nn.Module) -> bool:
        """Whether `target` takes exactly what `source` returns."""
        made = self._numbers(source, 1)
        _, calls = self._run({source: made})
        return target in calls and _is(calls[target].input, made.float())

    def _mixes(self, child: nn.Module, held: Mapping[nn.Module, Tensor]) -> bool:
        """Whether a token's output of `child` depends on the tokens before it, by other ways than
        the modules that are `held`."""
        moved = self.stream.clone()
        moved[:, 0] = _whole_numbers(moved[:, 0], 4)
        rows = []
        for stream in (self.stream, moved):
            _, calls = self._run(held, stream)
            output = calls[child].output
            assert output is not None
            rows.append(output[:, 1:].float())
        change, size = (rows[1] - rows[0]).norm(), rows[0].norm()
        return bool(change > _MIXES.get(self.stream.dtype, _MIXES_HALF) * size)

    def _run(
        self, made: Mapping[nn.Module, Tensor], stream: Tensor | None = None
    ) -> tuple[Tensor, dict[nn.Module, Call]]:
        """The block's output in float32, where each module of `made` returns its tensor, and the
        calls of all modules."""
        stand_ins = {m: returning(self.calls[m].returned, state) for m, state in made.items()}
        args, kwargs = with_tensor(
            self.call.args, self.call.kwargs, (self.stream if stream is None else stream).clone()
        )
        with ExitStack() as stack:
            stack.enter_context(standing_in(stand_ins))
            calls = stack.enter_context(watching(self.block.modules()))
            out = first_tensor(self.block(*args, **kwargs))
        return out.float(), calls

    def _numbers(self, module: nn.Module, seed: int) -> Tensor:
        output = self.calls[module].output
        assert output is not None
        return _whole_numbers(output, seed)

    def _fits(self, child: nn.Module) -> bool:
        output = self.calls[child].output
        return output is not None and output.shape == self.stream.shape

    def _same_rows(self, value: Tensor) -> bool:
        return value.shape[:-1].numel() == self.stream.shape[:-1].numel()


def attends(module: nn.Module) -> bool:
    """Whether a module says that it is an attention."""
    return "attention" in type(module).__name__.lower()


def _mixes_channels(module: nn.Module) -> bool:
    """Whether `module` has weights that mix channels; a norm weighs each by itself."""
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _with_matrix(owner: nn.Module) -> Iterator[nn.Module]:
    """The modules of `owner` that have a weight matrix, last to first."""
    for module in reversed(list(owner.modules())):
        if getattr(getattr(module, "weight", None), "ndim", 0) == 2:
            yield module


def _whole_numbers(like: Tensor, seed: int) -> Tensor:
    """Small whole numbers of the shape, dtype and device of `like`, others for each `seed`."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-_LARGEST, _LARGEST + 1, like.shape, generator=generator).to(like)


def _is(value: Tensor | None, wanted: Tensor) -> bool:
    if value is None or value.numel() != wanted.numel():
        return False
    return torch.equal(value.float().reshape(wanted.shape), wanted)
