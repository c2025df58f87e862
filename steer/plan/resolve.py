"""Interventions with all that they name: looked up, checked and allowed, once each.

What compiling needs to know of an intervention stands in a `Resolved`: the artefacts of its marked
fields, its hook points, its tokens and its gate. Later steps ask nobody else.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias, TypeVar

import torch
from torch import Tensor

from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.sae.base import SAE
from steer.errors import IncompatibleArtefact, SpecError, SteerError, Unsupported, pointer
from steer.model import Capabilities, HookPoint
from steer.plan import selection
from steer.plan.plan import Gate
from steer.plan.points import Found, check_layers_said, hook_points, row
from steer.plan.selection import NO_READER, Ramp, Selection, TokenReader
from steer.plan.sources import EncodeText, Named, Sources
from steer.references import Reference, own_references
from steer.spec import (
    MAX_TEXTS,
    InlineVector,
    Intervention,
    Site,
    SteeringSpec,
    When,
    WhenDetected,
    Where,
)

Kind = TypeVar("Kind", ControlVector, SAE, LowRankAdapter, AffineMap)
Tokenize: TypeAlias = Callable[[str], list[int]]
StrengthLimit: TypeAlias = Literal["off", "refuse", "cap"]
"""What happens to a strength outside the calibrated range of its vector."""


@dataclass(frozen=True)
class Policy:
    """What whoever serves allows in a spec: vectors that it carries, and which strengths."""

    inline_vectors: bool = True
    strength_limit: StrengthLimit = "off"

    @property
    def measuring(self) -> Policy:
        """For what reports a strength as it was asked for: one that is capped would be reported
        falsely, so it is refused."""
        limit = self.strength_limit
        return replace(self, strength_limit="refuse" if limit == "cap" else limit)

    def check(self, spec: SteeringSpec) -> None:
        """Raises `Unsupported` (`inline_vectors_disabled`) where `spec` carries what it may not."""
        if self.inline_vectors:
            return
        for reference in spec.references():
            if isinstance(reference.ref, InlineVector):
                raise Unsupported(
                    "this server takes no vectors inside requests: upload it to "
                    "/v1/steering/vectors and give its name",
                    param=reference.param,
                    code="inline_vectors_disabled",
                )


OPEN = Policy()
"""Everything that the engine can do."""


@dataclass(frozen=True)
class Compilation:
    """A spec to be compiled, what it is compiled from, and what for."""

    spec: SteeringSpec
    sources: Sources
    capabilities: Capabilities
    reader: TokenReader = NO_READER
    policy: Policy = OPEN


@dataclass(frozen=True)
class ResolvedGate:
    """A gate as the spec has it (at the pointer `param`) and as a plan does, and what it reads by:
    the artefact that its field `field` names."""

    when: When
    gate: Gate
    field: Literal["vector", "detector"]
    read: ControlVector | Detector
    param: str


@dataclass(frozen=True)
class ResolvedStrength:
    """The number a strength became, and what was asked for, as JSON. `above_null` is what the
    calibration behind it found (`Calibration.above_null`)."""

    strength: float
    requested: Any
    capped: bool = False
    above_null: bool | None = None


@dataclass(frozen=True)
class Resolved:
    """An intervention and everything it needs, checked against the model.

    `named` are the artefacts of its own fields, in their order. `fault` is what is wrong with its
    tokens or its gate, which is told where nothing else is: one wrong 'where' or 'when' of the
    whole spec does not hide what is wrong with the interventions. Later steps put a number for the
    strength into `item` (`strength` says what became of it) and the vector without the overlap
    with others into `composed`, which `direction` then is, and what a concept's text means to its
    SAE, `[d_sae]`, into `latents`.
    """

    place: int
    item: Intervention
    named: tuple[Found, ...]
    points: tuple[HookPoint, ...]
    where: Where | None
    selection: Selection
    gate: ResolvedGate | None
    encode_text: EncodeText | None
    ramp: Ramp | None = None
    fault: SteerError | None = None
    strength: ResolvedStrength | None = None
    composed: ControlVector | None = None
    latents: Tensor | None = None

    @property
    def rule_selection(self) -> Selection:
        """The tokens as a rule selects them, with the ramp: a gate on the prompt is decided at its
        last token."""
        held = self.gate is not None and self.gate.gate.prompt_scope
        if self.ramp is None and not held:
            return self.selection
        return replace(self.selection, from_last_prompt_token=held, ramp=self.ramp)

    @property
    def ramp_param(self) -> str:
        """The pointer of its ramp in the spec."""
        own = self.item.ramp is not None
        return pointer("interventions", self.place, "ramp") if own else pointer("ramp")

    def vector(self, field: str) -> ControlVector:
        """The vector that the field names."""
        return self._artefact(field, ControlVector)

    @property
    def direction(self) -> ControlVector:
        """The vector of an intervention that has one: its composed form where there is one."""
        return self.vector("vector") if self.composed is None else self.composed

    def sae(self, field: str) -> SAE:
        """The SAE that the field names."""
        return self._artefact(field, SAE)

    def adapter(self, field: str) -> LowRankAdapter:
        """The adapter that the field names."""
        return self._artefact(field, LowRankAdapter)

    def affine_map(self, field: str) -> AffineMap:
        """The affine map that the field names."""
        return self._artefact(field, AffineMap)

    def _artefact(self, field: str, kind: type[Kind]) -> Kind:
        (found,) = [one for reference, one in self.named if reference.param == f"/{field}"]
        assert isinstance(found, kind), f"{field!r} names a {type(found).__name__}"
        return found


class Resolver:
    """Resolves one intervention after another; the spec's own tokens and gate once."""

    def __init__(self, asked: Compilation) -> None:
        self._asked = asked
        self._selections: dict[tuple[Where | None, str], Selection] = {}
        self._texts: frozenset[object] = frozenset()
        self._gates: dict[str, ResolvedGate] = {}

    def resolved(self, place: int, item: Intervention) -> Resolved:
        """The intervention at `place`; raises what is wrong with what it names or where it acts."""
        self._check_kind(item)
        named = self._all_named(item)
        points = hook_points(item, named, self._asked.sources.model)
        where, tokens, gate, fault = None, selection.EVERYWHERE, None, None
        try:
            where, at = self._where(place, item, named)
            tokens = self._selection(where, at)
            gate = self._gate(place, item)
        except SteerError as error:
            fault = error
        encode_text = self._asked.sources.encode_text
        ramp = Ramp.of(self._asked.spec.ramp if item.ramp is None else item.ramp)
        return Resolved(place, item, named, points, where, tokens, gate, encode_text, ramp, fault)

    def _check_kind(self, item: Intervention) -> None:
        able = self._asked.capabilities
        if item.kind not in able.kinds:
            raise Unsupported(
                f"the {able.engine} engine does not support the kind {item.kind!r}: "
                f"use one of {', '.join(able.kinds)}",
                param="/kind",
                code="unsupported_kind",
            )

    def _all_named(self, item: Intervention) -> tuple[Found, ...]:
        """What the item's own fields name. Tokens have directions where the item acts: at its site,
        or else at that of the first vector."""
        named: list[Found] = []
        site = item.site
        for reference in own_references(item):
            found = self._named(reference, site)
            if site is None and isinstance(found, ControlVector):
                site = found.card.site
            named.append((reference, found))
        return tuple(named)

    def _named(self, reference: Reference, site: Site | None = None) -> Named:
        try:
            return self._asked.sources.named(reference, site)
        except SteerError as error:
            raise error.at(reference.param) from None

    def _where(
        self, place: int, item: Intervention, named: Sequence[Found]
    ) -> tuple[Where | None, str]:
        """The intervention's tokens, else the spec's, else those of the card of what it names; one
        that only excepts is taken over the next."""
        where, at = None, ""
        if item.takes_card_where:
            reference, found = named[0]
            where = found.card.default_where
            at = pointer("interventions", place) + reference.param
        for given, its in (
            (self._asked.spec.where, "/where"),
            (item.where, pointer("interventions", place, "where")),
        ):
            if given is not None:
                try:
                    where, at = given.over(where), its
                except SteerError as error:
                    error.param = its + (error.param or "")
                    raise
        return where, at

    def _selection(self, where: Where | None, at: str) -> Selection:
        key = (where, at)
        if key not in self._selections:
            self._check_texts(where, at)
            self._selections[key] = selection.resolve(where, self._asked.reader, param=at)
        return self._selections[key]

    def _check_texts(self, where: Where | None, at: str) -> None:
        """Each text takes its time for every token: a spec, its cards included, has few."""
        self._texts |= frozenset() if where is None else where.texts
        if len(self._texts) > MAX_TEXTS:
            raise SpecError(
                f"this spec looks for {len(self._texts)} different texts in 'after', 'before', "
                f"'between' and 'outside', and at most {MAX_TEXTS} are followed: name fewer",
                param=at,
                code="too_many_texts",
            )

    def _gate(self, place: int, item: Intervention) -> ResolvedGate | None:
        if item.when is not None:
            when, at = item.when, pointer("interventions", place, "when")
        elif self._asked.spec.when is not None:
            when, at = self._asked.spec.when, "/when"
        else:
            return None
        if at not in self._gates:
            self._gates[at] = self._resolved_gate(when, at)
        return self._gates[at]

    def _resolved_gate(self, when: When, at: str) -> ResolvedGate:
        self._check_scope(when, at)
        reference, *_ = own_references(when, at)
        if isinstance(when, WhenDetected):
            return self._detecting(when, reference, at)
        vector = self._named(reference)
        assert isinstance(vector, ControlVector)
        if when.layer is None:
            check_layers_said(reference, at + "/layer")
        layer = vector.card.used_layers[0] if when.layer is None else when.layer
        layer_at = reference.param if when.layer is None else at + "/layer"
        point = HookPoint(layer, vector.card.site)
        direction = self._direction(vector, point, reference.param, layer_at)
        gate = Gate(
            name="inline" if isinstance(reference.ref, InlineVector) else vector.card.name,
            point=point,
            direction=direction / direction.norm(),
            above=-math.inf if when.above is None else _bound(when.above),
            below=math.inf if when.below is None else _bound(when.below),
            cosine=when.measure == "cosine",
            scope=when.scope,
        )
        return ResolvedGate(when, gate, "vector", vector, at)

    def _detecting(self, when: WhenDetected, reference: Reference, at: str) -> ResolvedGate:
        """The gate that opens where the detector that `reference` names fires."""
        detector = self._named(reference)
        assert isinstance(detector, Detector)
        self._check_reads(detector, detector.point, reference.param, reference.param)
        threshold = detector.threshold if when.threshold is None else when.threshold
        gate = Gate(
            name=when.detector.partition("@")[0],
            point=detector.point,
            direction=detector.direction,
            above=_bound(threshold),
            below=math.inf,
            cosine=False,
            scope=when.scope,
            bias=detector.bias,
            # Of one token the greatest score and the mean are the same.
            pooling=detector.detection.pooling if detector.detection.last > 1 else "max",
            last=detector.detection.last,
        )
        return ResolvedGate(when, gate, "detector", detector, at)

    def _check_scope(self, when: When, at: str) -> None:
        scopes = self._asked.capabilities.gate_scopes
        if when.scope not in scopes:
            known = " or ".join(map(repr, scopes))
            raise Unsupported(
                f"this engine has no gates of scope {when.scope!r}: "
                + (f"use {known}" if known else "send the spec without 'when'"),
                param=at,
                code="unsupported_gate",
            )

    def _direction(self, vector: ControlVector, point: HookPoint, at: str, layer_at: str) -> Tensor:
        """The row `[width]` of a gate's vector; `at` and `layer_at` point at vector and layer."""
        self._check_reads(vector, point, at, layer_at)
        try:
            return row(vector, point.layer)
        except SteerError as error:
            raise error.at(layer_at) from None

    def _check_reads(
        self, read: ControlVector | Detector, point: HookPoint, at: str, point_at: str
    ) -> None:
        model = self._asked.sources.model
        model.check_point(point, param=point_at)
        if read.card.width != model.width(point.site):
            raise IncompatibleArtefact(
                f"the gate's {read.card.kind} {read.card.name!r} has width {read.card.width}; "
                f"{point} has width {model.width(point.site)}",
                code="wrong_width",
                param=at,
            )


def _bound(value: float) -> float:
    """A gate's bound as far as float32, in which gates read, has numbers: none is beyond."""
    largest = torch.finfo(torch.float32).max
    return min(max(value, -largest), largest)
