"""One forward pass of vLLM's model, as its taps reach it: what is edited, and what is kept.

An edit of the stream goes to its `residual` half as a difference. Where nothing is edited the
difference is zero and is subtracted, x − 0.0 being x for every x, so that an unsteered token next
to a steered one keeps its bits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

from steer.batch.gates import Decisions
from steer.batch.requests import Ints
from steer.batch.step import Step
from steer.engines.vllm.taps import ops
from steer.engines.vllm.taps.inner_sites import Shard
from steer.engines.vllm.taps.taps import ADDED, points_of, tap_of
from steer.model import HookPoint
from steer.readouts.readings import Readings
from steer.spec import Site

Keep = Callable[[HookPoint, Tensor], None]

_WHOLE: Mapping[Site, Shard] = {}


class ForwardPass:
    """A `Visitor` over the first `tokens` rows of the batch; the rest is padding.

    `keep` is shown the state `[tokens, d]` at each point of `wanted`, after the edits there, and
    `readings` at their own points both that and the state before.
    `shards` are the sites whose rows are split over workers; there every worker edits whole rows.
    """

    def __init__(
        self,
        step: Step | None,
        tokens: int,
        n_layers: int,
        wanted: frozenset[HookPoint] = frozenset(),
        keep: Keep | None = None,
        shards: Mapping[Site, Shard] = _WHOLE,
        readings: Readings | None = None,
    ) -> None:
        self._shards, self._readings = shards, readings
        self._step, self._tokens, self._wanted, self._keep = step, tokens, wanted, keep
        edited = step.points if step is not None else frozenset()
        visited = edited | wanted | (readings.points if readings is not None else frozenset())
        self.taps = frozenset(tap_of(point) for point in visited)
        self._points = {
            tap: [point for point in points_of(tap, n_layers) if point in visited]
            for tap in self.taps
        }

    def start(self) -> None:
        """Makes this the pass that the taps reach."""
        ops.set_running(self)

    def carry_on(self, changes: Mapping[int, Ints]) -> None:
        """Takes the same requests on by a token (`Step.carry_on`)."""
        if self._step is not None:
            self._step.carry_on(changes)

    def take(self, decisions: Decisions) -> None:
        """Does what gates of earlier stages decided (`Step.take`)."""
        if self._step is not None:
            self._step.take(decisions)

    def decisions(self) -> Decisions | None:
        """What gates have decided up to the end of this stage."""
        return None if self._step is None else self._step.decisions()

    def visit(self, tap: int, hidden: Tensor, residual: Tensor | None) -> None:
        """Runs the edits of `tap` on `hidden` and `residual`, in place."""
        hidden = hidden[: self._tokens]
        residual = None if residual is None else residual[: self._tokens]
        for point in self._points[tap]:
            if point.site in ADDED or residual is None:
                self._visit_whole(point, hidden)
            else:
                self._visit_sum(point, hidden, residual)

    def finish(self) -> None:
        """Counts what was applied; raises `EngineError` if a point was never reached."""
        if self._step is not None:
            self._step.finish()

    def _visit_whole(self, point: HookPoint, x: Tensor) -> None:
        shard = self._shards.get(point.site)
        state = x if shard is None else shard.gather(x)
        edited = state if self._step is None else self._step.edit(point, state)
        self._show(point, state, edited)  # before `x`, which may be `state`, is written over
        if edited is not state:
            x.copy_(edited if shard is None else shard.own(edited))

    def _visit_sum(self, point: HookPoint, hidden: Tensor, residual: Tensor) -> None:
        stream = hidden.float() + residual.float()
        edited = stream if self._step is None else self._step.edit(point, stream)
        if edited is not stream:
            residual.sub_(stream - edited)  # in float32, whatever its own type
        self._show(point, stream, edited)

    def _show(self, point: HookPoint, before: Tensor, after: Tensor) -> None:
        if self._keep is not None and point in self._wanted:
            self._keep(point, after)
        if self._readings is not None:
            self._readings.see(point, before, after)
