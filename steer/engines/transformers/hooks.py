"""A model whose hook points can be edited and read during one forward pass.

Hooks exist only at the points that some step has needed, and return at once in any other step.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from steer.batch.step import Step
from steer.engines.base import QueriesKeys
from steer.engines.transformers.cache import cache_keyword
from steer.engines.transformers.structure.attention import no_interface, scores_read
from steer.engines.transformers.structure.blocks import HookMap
from steer.engines.transformers.structure.calls import (
    at_rest,
    first_tensor,
    given_tensor,
    with_tensor,
)
from steer.engines.transformers.structure.sites import HookTarget
from steer.engines.transformers.structure.token_rows import token_rows
from steer.errors import EngineError
from steer.model import HookPoint, forward_order
from steer.readouts.readings import Readings

_OPTIONAL = ("attention_mask", "position_ids", "logits_to_keep")
"""Arguments that some models do without: they count positions themselves, or return all logits."""


_TRIAL = 16
"""The tokens on which it is tried whether a model's first blocks run apart."""


class _AllRead(Exception):
    """Ends a forward pass of which nothing more is wanted."""


class HookedModel:
    """Assumes: one forward pass at a time.

    Guarantees: without a step and without captures the model computes what it would compute
    without hooks; `remove` leaves the model as it was found.
    """

    def __init__(self, model: nn.Module, hook_map: HookMap) -> None:
        self.model, self.map, self.info = model, hook_map, hook_map.info
        self._cache_keyword = cache_keyword(model)
        self._parameters = frozenset(inspect.signature(model.forward).parameters)
        self._handles: dict[HookPoint, torch.utils.hooks.RemovableHandle] = {}
        self._step: Step | None = None
        self._readings: Readings | None = None
        self._tokens: int | None = None
        self._wanted: frozenset[HookPoint] = frozenset()
        self._captured: dict[HookPoint, Tensor] = {}
        self._last: HookPoint | None = None
        self._placed: tuple[HookPoint, Tensor] | None = None

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device

    def forward(
        self,
        step: Step | None,
        capture: Iterable[HookPoint] = (),
        *,
        readings: Readings | None = None,
        key_values: Any = None,
        states_alone: bool = False,
        **inputs: Any,
    ) -> tuple[Any, dict[HookPoint, Tensor]]:
        """One forward pass with `step`'s edits; the outputs, and a copy of every captured state.

        States are captured after the edits at their point, and `readings` see them there, which
        the caller finishes once the model may be run again, as lenses do. Positions, mask and
        `logits_to_keep` go to models that take them. With `states_alone` the pass ends, without
        outputs, where the last state was captured and `step` has nothing left to do.
        """
        given = {n: v for n, v in inputs.items() if n not in _OPTIONAL or n in self._parameters}
        if key_values is not None:
            given[self._cache_keyword] = key_values
        self.begin(step, capture, readings)
        self._tokens = inputs["input_ids"].numel()
        if states_alone:
            self._last = self._last_point()
        try:
            outputs = self.model(**given)
            return outputs, self.end()
        except _AllRead:
            return None, self.end()
        finally:
            self._step, self._readings, self._wanted = None, None, frozenset()
            self._tokens, self._last = None, None

    def _last_point(self) -> HookPoint | None:
        """The point after which nothing is read or edited; None where that is not sure: parts of a
        block run in an order of the model's own."""
        edited = frozenset() if self._step is None else self._step.points
        last = max(self._wanted | edited, key=forward_order, default=None)
        if last is None or (edited and last.site != "resid_post"):
            return None
        return last

    def begin(
        self,
        step: Step | None,
        capture: Iterable[HookPoint] = (),
        readings: Readings | None = None,
    ) -> None:
        """Arms the hooks for the next forward pass."""
        self._step, self._wanted, self._captured = step, frozenset(capture), {}
        self._readings = readings
        edited = step.points if step is not None else frozenset()
        seen = readings.points if readings is not None else frozenset()
        for point in self._wanted | edited | seen:
            if point not in self._handles:
                self._add(point)

    def end(self) -> dict[HookPoint, Tensor]:
        """Disarms the hooks; raises if a point that was asked for was never reached."""
        step, wanted, captured = self._step, self._wanted, self._captured
        self._step, self._wanted, self._captured = None, frozenset(), {}
        self._readings = None
        if step is not None:
            step.finish()
        if len(captured) < len(wanted):
            raise EngineError(f"no state passed {sorted(map(str, wanted - captured.keys()))}")
        return captured

    def remove(self) -> None:
        """Takes every hook off the model."""
        for handle in self._handles.values():
            handle.remove()
        self._handles.clear()
        self._step, self._readings, self._wanted = None, None, frozenset()

    def stem(self, depth: int, ids: Tensor, places: Tensor) -> Tensor | None:
        """What block `depth` is given of one unsteered row, `ids` and positions `[1, columns]`, as
        states `[1, columns, d_model]`; None where the blocks below it do not run apart."""
        point = HookPoint(depth, "resid_pre")
        if point not in self.map.targets:
            return None

        def inputs(ids: Tensor) -> dict[str, Any]:
            positions = places[:, : ids.shape[1]].expand_as(ids)
            one = {"input_ids": ids, "position_ids": positions, "use_cache": False}
            return one | {"attention_mask": torch.ones_like(ids)}

        def states(ids: Tensor) -> Tensor:
            return self.forward(None, [point], states_alone=True, **inputs(ids))[1][point]

        few = ids[:, :_TRIAL]

        def logits() -> Tensor:
            made: Tensor = self.forward(None, **inputs(few.expand(2, -1)))[0].logits
            return made

        def logits_above() -> Tensor:
            given = states(few)
            self.forward(None, **inputs(few.flip(1)))  # what blocks keep to themselves is of this
            with self.above(depth, given.expand(2, -1, -1)):
                return logits()

        return states(ids) if self.map.stem.serves(depth, logits, logits_above) else None

    def above(self, depth: int, states: Tensor | None) -> AbstractContextManager[None]:
        """Inside the `with` block passes begin at block `depth`, which is given `states`
        `[rows, columns, d_model]`; with None they are as always."""
        return nullcontext() if states is None else self.map.stem.given(depth, states)

    def unembed(self, states: Tensor) -> Tensor:
        """What the model makes of states after its last block: `[..., d_model]` to float32 logits
        `[..., vocab]`. Raises `Unsupported` (`no_unembedding`) where that cannot be replayed."""
        return self.map.head(self.model, states)

    def token_rows(self, tokens: Sequence[int]) -> Tensor:
        """See `Engine.token_rows`. Raises `Unsupported` (`no_unembedding`)."""
        return token_rows(self.model, self.map.head, tokens, self.info.d_model)

    def project(self, point: HookPoint, states: Tensor) -> Tensor:
        """What the module whose input `point` is makes of other inputs: `[..., width]` to float32
        `[..., d_model]`."""
        module = self.map.targets[point].module
        dtype = next(self.model.parameters()).dtype
        rows = states.to(self.device, dtype).reshape(-1, 1, states.shape[-1])
        with torch.no_grad(), at_rest(module):
            made = first_tensor(module(rows))
        return made.float().reshape(*states.shape[:-1], -1)

    def carry(self, source: HookPoint, target: HookPoint, states: Tensor) -> Tensor:
        """What the block of both points makes at `target` of `states` at `source`, each a sequence
        of one token: `[N, width]` to float32 `[N, width]`."""
        dtype = next(self.model.parameters()).dtype
        rows = states.to(self.device, dtype)[:, None]
        nothing = rows.new_zeros(len(rows), 1, self.info.d_model)
        ids = torch.ones(len(rows), 1, dtype=torch.long, device=self.device)
        self.begin(None, (source, target))
        self._tokens, self._last, self._placed = len(rows), target, (source, rows)
        try:
            with at_rest(self.model), self.above(source.layer, nothing):
                self.model(input_ids=ids, use_cache=False)
        except _AllRead:
            return self._captured[target][:, 0].float()
        finally:
            self._wanted, self._captured = frozenset(), {}
            self._tokens = self._last = self._placed = None
        raise EngineError(f"no state passed {target} after {source}")

    def queries_and_keys(self, layer: int, states: Tensor) -> QueriesKeys:
        """See `Engine.queries_and_keys`."""
        start, end = HookPoint(layer, "resid_pre"), HookPoint(layer, "head_out")
        self.info.check_point(end)
        with scores_read(self.map.targets[end].module) as found:
            self.carry(start, end, states)
        if not found:
            raise no_interface(layer, self.info)
        return found[0]

    def _visit(self, point: HookPoint, x: Tensor) -> Tensor:
        if self._tokens is not None and x.shape[:-1].numel() != self._tokens:
            raise EngineError(
                f"{self.info.architecture} computes {x.shape[:-1].numel()} of {self._tokens} "
                f"tokens at {point}: edits and captures would fall on other tokens"
            )
        before = x
        if self._placed is not None and point == self._placed[0]:
            x = self._placed[1]
        if self._step is not None:
            x = self._step.edit(point, x)
        if self._readings is not None:
            self._readings.see(point, before, x)
        if point in self._wanted:
            # A copy: later modules may add to this tensor in place.
            self._captured[point] = x.detach().clone()
        if point == self._last and len(self._captured) == len(self._wanted):
            raise _AllRead
        return x

    @property
    def _idle(self) -> bool:
        return self._step is None and self._readings is None and not self._wanted

    def _add(self, point: HookPoint) -> None:
        """Hooks `point`, before the later points that lie at the same place: around a block that
        does not run there is one place for several."""
        target = self.map.targets[point]
        later = [
            other
            for other in self._handles
            if self.map.targets[other] == target and forward_order(other) > forward_order(point)
        ]
        for other in later:
            self._handles.pop(other).remove()
        for one in (point, *sorted(later, key=forward_order)):
            self._handles[one] = self._install(one, target)

    def _install(self, point: HookPoint, target: HookTarget) -> torch.utils.hooks.RemovableHandle:
        if target.side == "output":
            return target.module.register_forward_hook(self._after(point))
        return target.module.register_forward_pre_hook(
            self._before(point, target.in_place), with_kwargs=True
        )

    def _after(self, point: HookPoint) -> Callable[..., Any]:
        def hook(module: nn.Module, args: Any, output: Any) -> Any:
            if self._idle:
                return None
            x = first_tensor(output)
            edited = self._visit(point, x)
            if edited is x:
                return None
            return edited if isinstance(output, Tensor) else (edited, *output[1:])

        return hook

    def _before(self, point: HookPoint, in_place: bool) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            if self._idle:
                return None
            x = given_tensor(args, kwargs)
            assert x is not None
            edited = self._visit(point, x)
            if edited is x:
                return None
            if in_place:
                x.copy_(edited)
                return None
            return with_tensor(args, kwargs, edited)

        return hook
