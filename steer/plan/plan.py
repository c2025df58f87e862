"""A spec made ready to run: names resolved, widths checked, programs compiled, order fixed.

A plan is a short list of *rules*. A rule has one selection of tokens, at most one gate, and at
most one block per hook point; at a hook point the rules run in order. Interventions are packed
greedily into the earliest rule that keeps the order the spec lists; neighbouring constant adds
fuse into one row. So a token needs one slot number per rule, however long the spec is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

from torch import Tensor

from steer.artefacts.detection import Pooling
from steer.edits import Block, Encoder
from steer.errors import Unsupported
from steer.model import HookPoint, forward_order
from steer.plan.selection import Selection
from steer.prompts.roles import RoleRanges
from steer.spec import GateScope, SteeringSpec

Blocks: TypeAlias = dict[HookPoint, Block]
"""What an intervention does at each of its hook points."""

AS_REQUESTED = frozenset({"requested", "capped", "above_null"})
"""The keys of a summary that tell what was asked for where it became another number."""
EXPLAINING = frozenset({"lit"})
"""The keys that tell how an edit came to be: numbers of a forward pass, no part of its name."""


@dataclass(frozen=True)
class Gate:
    """A condition on the residual stream: open where above < value < below.

    The value is the product with `direction` `[d]`, and `bias`: a detector's score, or with a unit
    row the projection; or it is the cosine. Of the `last` tokens that it has read, where these are
    more than one, it is the greatest of their scores or the mean, as `pooling` says. One that reads
    `elsewhere` is decided by an earlier stage of a pipeline, whose decisions come with the states.
    """

    name: str
    point: HookPoint
    direction: Tensor
    above: float
    below: float
    cosine: bool
    scope: GateScope
    bias: float = 0.0
    elsewhere: bool = False
    pooling: Pooling = "max"
    last: int = 1

    @property
    def pools(self) -> bool:
        """Whether its value is that of several tokens."""
        return self.last > 1

    @property
    def prompt_scope(self) -> bool:
        """Whether the last prompt token decides it, for the rest of the request."""
        return self.scope == "prompt"

    @property
    def onward(self) -> bool:
        """Whether the first token that finds it open opens it for all that come."""
        return self.scope == "onward"

    @property
    def identity(self) -> tuple[object, ...]:
        """What tells gates apart; inline vectors share a name, so the direction itself counts."""
        direction = self.direction.numpy().tobytes()
        law = (self.above, self.below, self.bias, self.cosine, self.pooling, self.last)
        return (self.name, self.point, direction, *law, self.scope)


@dataclass(frozen=True)
class Rule:
    """Blocks that share a selection and a gate, at most one per hook point."""

    selection: Selection
    gate: Gate | None
    blocks: Mapping[HookPoint, Block]

    @property
    def touched(self) -> frozenset[HookPoint]:
        """The hook points of its blocks, and those that these read."""
        return read_elsewhere(self.blocks).union(self.blocks)


@dataclass(frozen=True)
class SteeringPlan:
    """What an engine needs to carry out one spec; identified by `fingerprint`."""

    fingerprint: str
    spec: SteeringSpec
    rules: tuple[Rule, ...]
    artefacts: tuple[str, ...]
    strengths: tuple[float, ...]
    summary: tuple[Mapping[str, Any], ...]

    # A plan is kept and asked by every request of its spec.

    @cached_property
    def points(self) -> tuple[HookPoint, ...]:
        """Every hook point that is edited, in forward order."""
        return tuple(sorted({p for one in self.rules for p in one.blocks}, key=forward_order))

    @cached_property
    def reached(self) -> tuple[HookPoint, ...]:
        """Every hook point that is edited or that an edit behind it reads, in forward order."""
        return tuple(sorted({p for one in self.rules for p in one.touched}, key=forward_order))

    @cached_property
    def lowest(self) -> int | None:
        """The first block that it has anything to do with: it edits there, or an edit or a gate
        reads there. None where it does nothing."""
        gates = (one.gate.point for one in self.rules if one.gate is not None)
        return min((point.layer for point in (*self.reached, *gates)), default=None)

    @cached_property
    def selections(self) -> tuple[Selection, ...]:
        """The tokens that each rule selects."""
        return tuple(one.selection for one in self.rules)

    @cached_property
    def ramped(self) -> bool:
        """Whether a token may get less than the whole of an edit."""
        return any(one.ramp is not None for one in self.selections)

    @cached_property
    def gated(self) -> bool:
        return any(one.gate is not None for one in self.rules)

    @cached_property
    def onward(self) -> int:
        """The rules whose gate stays open from the first token that opens it, as bits."""
        return sum(
            (one.gate is not None and one.gate.onward) << number
            for number, one in enumerate(self.rules)
        )

    @cached_property
    def pooled(self) -> tuple[int, ...]:
        """How many tokens the gate of each rule takes together, 1 where it reads one or there is
        none; empty where no gate pools."""
        lasts = tuple(1 if one.gate is None else one.gate.last for one in self.rules)
        return lasts if max(lasts, default=1) > 1 else ()

    @cached_property
    def ranked(self) -> int:
        """The latents of the largest TopK SAE whose features are clamped, every one of which is
        ranked for each token; 0 where there is none."""
        return max((one.latents for one in self._encoders if one.ranks), default=0)

    @cached_property
    def latents(self) -> int:
        """The numbers that kernels hold for each token: those that are ranked, and what edits read
        at an earlier hook point."""
        return self.ranked + sum(block.kept for block in self._blocks)

    @property
    def competes(self) -> bool:
        """Whether features are clamped that compete with others of their SAE."""
        return bool(self._encoders)

    @cached_property
    def graphless(self) -> bool:
        """Whether it does what no kernel does: it asks an encoder that does not rank, a gate pools
        the scores of several tokens, or what it reads at an earlier hook point lies before a gate
        of its rule."""
        early = (
            one.gate is not None and forward_order(point) < forward_order(one.gate.point)
            for one in self.rules
            for point in read_elsewhere(one.blocks)
        )
        return any(early) or bool(self.pooled) or not all(one.ranks for one in self._encoders)

    @cached_property
    def _blocks(self) -> tuple[Block, ...]:
        return tuple(block for one in self.rules for block in one.blocks.values())

    @cached_property
    def _encoders(self) -> tuple[Encoder, ...]:
        return tuple(block.encoder for block in self._blocks if block.encoder is not None)

    @cached_property
    def resolved_strengths(self) -> tuple[Mapping[str, Any], ...]:
        """Every strength that is not as written: what was asked for, and the number it became.

        One from a calibration whose effect was no more than chance says so: `above_null` is false.
        """
        return tuple(
            {
                "intervention": place,
                "requested": entry["requested"],
                "strength": entry["strength"],
                "capped": entry.get("capped", False),
                **{key: entry[key] for key in ("above_null",) if key in entry},
            }
            for place, entry in enumerate(self.summary)
            if "requested" in entry
        )

    @cached_property
    def explanations(self) -> tuple[Mapping[str, Any], ...]:
        """For each concept that is to be explained, the features that its text lit."""
        return tuple(
            {"intervention": place, "features": entry["lit"]}
            for place, entry in enumerate(self.summary)
            if "lit" in entry
        )

    @cached_property
    def reads_roles(self) -> bool:
        """Whether it depends on whose message a token stands in: a request must say that."""
        return any(one.reads_roles for one in self.selections)

    def first_steered(
        self, prompt: tuple[int, ...], horizon: int, roles: RoleRanges | None = None
    ) -> int | None:
        """The first position whose state this plan may change."""
        firsts = [one.first(prompt, horizon, roles) for one in self.selections]
        return min((first for first in firsts if first is not None), default=None)

    def first_needed(
        self, prompt: tuple[int, ...], horizon: int, roles: RoleRanges | None = None
    ) -> int | None:
        """The first position whose state this plan may change, or whose score a gate pools: what
        lies before it can be shared."""
        first = self.first_steered(prompt, horizon, roles)
        gates = [one.gate for one in self.rules if one.gate is not None]
        pooled = max((one.last for one in gates if one.pools and one.prompt_scope), default=0)
        if not pooled:
            return first
        read = max(len(prompt) - pooled, 0)
        return read if first is None else min(first, read)

    def describe(self) -> dict[str, Any]:
        """What would be applied where, for people and for `/v1/steering/validate`."""
        return {
            "fingerprint": self.fingerprint,
            "passes": len(self.rules),
            "hook_points": [{"layer": p.layer, "site": p.site} for p in self.points],
            "interventions": [dict(entry) for entry in self.summary],
        }


def read_elsewhere(blocks: Mapping[HookPoint, Block]) -> frozenset[HookPoint]:
    """The hook points that edits read which write at others."""
    points = (block.reads_at for block in blocks.values())
    return frozenset(point for point in points if point is not None)


def check_rules(count: int, limit: int) -> None:
    """Raises `Unsupported` for a plan of more rules than `limit`."""
    if count > limit:
        raise Unsupported(
            f"this spec needs {count} passes over a token and {limit} are "
            "supported: merge interventions that share 'where', or send fewer",
            code="too_many_passes",
            param="/interventions",
        )
