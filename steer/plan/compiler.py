"""Specs to plans: every intervention resolved, checked, compiled and packed into rules."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from steer.errors import IncompatibleArtefact, SpecError, SteerError, Unsupported, pointer
from steer.model import Capabilities, HookPoint, forward_order
from steer.plan import kinds
from steer.plan.composition import compose
from steer.plan.kinds import Blocks, Sources
from steer.plan.plan import AS_REQUESTED, Gate, Rule, SteeringPlan, check_rules
from steer.plan.selection import Selection, resolve
from steer.plan.strengths import ResolvedStrength, Use, resolve_strength
from steer.spec import (
    Add,
    Clamp,
    Concept,
    InlineVector,
    Intervention,
    LowRank,
    SteeringSpec,
    VectorRef,
    When,
)

Tokenize = Callable[[str], list[int]]


def compile_plan(
    spec: SteeringSpec,
    sources: Sources,
    capabilities: Capabilities,
    tokenize: Tokenize | None = None,
) -> SteeringPlan:
    """Compiles every intervention; raises all problems at once, as one `SteerError`."""
    draft = _Draft(spec, sources, capabilities, tokenize)
    errors: list[SteerError] = []
    try:
        draft.sources = replace(sources, composed=compose(spec, sources))
    except SteerError as error:
        errors.append(error)
    for place, item in enumerate(spec.interventions):
        try:
            draft.append(place, item)
        except SteerError as error:
            errors.append(error)
            at = pointer("interventions", place)
            if not str(error.param).startswith(("/interventions", "/where", "/when")):
                error.param = at + (error.param or "")
    if len(errors) == 1:
        raise errors[0]
    if errors:
        # What is wrong with the spec's own 'where' or 'when' is found once for each intervention.
        problems = list(dict.fromkeys(p for error in errors for p in error.problems))
        if len(problems) == 1:
            raise errors[0]
        raise SpecError(
            f"{problems[0].message} (and {len(problems) - 1} more problems)",
            param=problems[0].param,
            code=problems[0].code,
            problems=problems,
        )
    return draft.finished()


@dataclass
class _OpenRule:
    selection: Selection
    gate: Gate | None
    blocks: Blocks = field(default_factory=dict)

    def fits(self, selection: Selection, gate: Gate | None) -> bool:
        mine = None if self.gate is None else self.gate.identity
        return self.selection == selection and mine == (None if gate is None else gate.identity)


class _Draft:
    """A plan in the making: resolves, compiles and packs one intervention after another."""

    def __init__(
        self,
        spec: SteeringSpec,
        sources: Sources,
        capabilities: Capabilities,
        tokenize: Tokenize | None,
    ) -> None:
        self.spec, self.sources = spec, sources
        self.capabilities, self.tokenize = capabilities, tokenize
        self.rules: list[_OpenRule] = []
        self.artefacts: list[str] = []
        self.strengths: list[float] = []
        self.summary: list[dict[str, Any]] = []

    def append(self, place: int, item: Intervention) -> None:
        """Compiles the intervention at `place` and packs its blocks."""
        if item.kind not in self.capabilities.kinds:
            raise Unsupported(
                f"the {self.capabilities.engine} engine does not support the kind {item.kind!r}: "
                f"use one of {', '.join(self.capabilities.kinds)}",
                param="/kind",
                code="unsupported_kind",
            )
        resolved = self._resolved_strength(place, item) if isinstance(item, Add) else None
        if resolved is not None:
            item = item.model_copy(update={"strength": resolved.strength})
        blocks = self._blocks(item)
        if self.spec.norm == "preserve":
            blocks = {p: replace(block, preserve_norm=True) for p, block in blocks.items()}
        selection, where = self._selection(place, item)
        when, when_at = (item.when, "/when") if item.when else (self.spec.when, "/when")
        gate = None
        if when is not None:
            at = pointer("interventions", place) + when_at if item.when else when_at
            gate = self._gate(when, at, blocks)
            selection = replace(selection, from_last_prompt_token=gate.prompt_scope)
        self._pack(blocks, selection, gate)
        self._describe(item, blocks, where, when)
        if resolved is not None:
            self.summary[-1]["requested"] = resolved.requested
            if resolved.capped:
                self.summary[-1]["capped"] = True

    def finished(self) -> SteeringPlan:
        """The plan; its fingerprint covers what was resolved, not how it was written."""
        self._check_rules()
        # A strength that was asked for in another way, but is the same, means the same.
        summary = [
            {key: value for key, value in entry.items() if key not in AS_REQUESTED}
            for entry in self.summary
        ]
        meaning = [summary, self.artefacts]
        text = json.dumps(meaning, sort_keys=True, separators=(",", ":"))
        ways = str(self.spec.norm) + (f"+{self.spec.compose}" if self.spec.compose else "")
        digest = hashlib.sha256(f"steer/plan/1\n{ways}\n{text}".encode()).hexdigest()
        rules = tuple(Rule(p.selection, p.gate, p.blocks) for p in self.rules)
        return SteeringPlan(
            fingerprint=digest[:32],
            spec=self.spec,
            rules=rules,
            artefacts=tuple(dict.fromkeys(self.artefacts)),
            strengths=tuple(self.strengths),
            summary=tuple(self.summary),
        )

    def _check_rules(self) -> None:
        limit = self.capabilities.limits.get("passes")
        if limit is not None:
            check_rules(len(self.rules), limit)

    def _resolved_strength(self, place: int, item: Add) -> ResolvedStrength | None:
        selection, _ = self._selection(place, item)
        use = Use(selection, self.spec.norm == "preserve", self.tokenize)
        return resolve_strength(item, use, self.sources)

    def _blocks(self, item: Intervention) -> Blocks:
        compile_kind: Callable[[Any, Sources], Blocks] = getattr(kinds, item.kind)
        return compile_kind(item, self.sources)

    def _selection(self, place: int, item: Intervention) -> tuple[Selection, Any]:
        if item.where is not None:
            where, at = item.where, pointer("interventions", place, "where")
        elif self.spec.where is not None:
            where, at = self.spec.where, "/where"
        else:
            where, at = self._card_where(item), pointer("interventions", place, "vector")
        return resolve(where, self.tokenize, param=at), where

    def _card_where(self, item: Intervention) -> Any:
        if isinstance(item, Clamp | Concept):
            return self.sources.sae(item.sae).card.default_where
        if isinstance(item, LowRank):
            return self.sources.library.low_rank(item.adapter).card.default_where
        vector = getattr(item, "vector", None)
        if vector is None or item.kind == "patch":
            return None
        return self.sources.vector(vector, "vector").card.default_where

    def _gate(self, when: When, at: str, blocks: Blocks) -> Gate:
        if when.scope not in self.capabilities.gate_scopes:
            known = " or ".join(map(repr, self.capabilities.gate_scopes))
            raise Unsupported(
                f"this engine has no gates of scope {when.scope!r}: "
                + (f"use {known}" if known else "send the spec without 'when'"),
                param=at,
                code="unsupported_gate",
            )
        vector = self.sources.vector(when.vector, at.removeprefix("/") + "/vector")
        layer = vector.card.used_layers[0] if when.layer is None else when.layer
        point = HookPoint(layer, vector.card.site)
        layer_at = at + ("/vector" if when.layer is None else "/layer")
        self.sources.model.check_point(point, param=layer_at)
        if vector.card.width != self.sources.model.width(point.site):
            raise IncompatibleArtefact(
                f"the gate's vector {vector.card.name!r} has width {vector.card.width}; {point} "
                f"has width {self.sources.model.width(point.site)}",
                code="wrong_width",
                param=at + "/vector",
            )
        early = [p for p in blocks if forward_order(p) < forward_order(point)]
        if early:
            raise SpecError(
                f"the gate reads {point}, after the edit at {early[0]}: gate on an earlier layer "
                "or edit later ones",
                param=at,
                code="gate_after_edit",
            )
        try:
            direction = kinds.row(vector, layer)
        except SteerError as error:
            raise error.at(layer_at) from None
        self.artefacts.append(vector.sha256)
        return Gate(
            name=vector.card.name if isinstance(when.vector, str) else "inline",
            point=point,
            direction=direction / direction.norm(),
            above=-float("inf") if when.above is None else when.above,
            below=float("inf") if when.below is None else when.below,
            cosine=when.measure == "cosine",
            prompt_scope=when.scope == "prompt",
        )

    def _pack(self, blocks: Blocks, selection: Selection, gate: Gate | None) -> None:
        """Puts `blocks` into the earliest rule after every rule that touches their points."""
        if not blocks:
            return
        last = max(
            (n for n, one in enumerate(self.rules) if not blocks.keys().isdisjoint(one.blocks)),
            default=-1,
        )
        if last >= 0 and self.rules[last].fits(selection, gate) and self._fuse(last, blocks):
            return
        for one in self.rules[last + 1 :]:
            if one.fits(selection, gate):
                one.blocks.update(blocks)
                return
        self.rules.append(_OpenRule(selection, gate, dict(blocks)))

    def _fuse(self, last: int, blocks: Blocks) -> bool:
        """Adds constants into rule `last`; False where one of the blocks is not a constant."""
        target = self.rules[last].blocks
        shared = target.keys() & blocks.keys()
        if not all(target[p].is_shift and blocks[p].is_shift for p in shared):
            return False
        for point, block in blocks.items():
            target[point] = target[point].fused_with(block) if point in shared else block
        return True

    def _describe(self, item: Intervention, blocks: Blocks, where: Any, when: When | None) -> None:
        entry: dict[str, Any] = item.model_dump(
            mode="json",
            by_alias=True,
            exclude_none=True,
            exclude={"layers", "site", "where", "when"},
        )
        for name in ("vector", "remove", "add", "toward"):
            ref: VectorRef | None = getattr(item, name, None)
            if isinstance(ref, str | InlineVector):
                vector = self.sources.vector(ref, name)
                entry[name] = f"{vector.card.name or 'inline'}@{vector.sha256[:12]}"
                self.artefacts.append(vector.sha256)
        if item.kind == "add" and item.strength is None:
            entry["strength"] = self.sources.vector(item.vector, "vector").card.default_strength
        if hasattr(item, "sae"):
            sae = self.sources.sae(item.sae)
            entry["sae"] = f"{_bare(item.sae)}@{sae.sha256[:12]}"
            self.artefacts.append(sae.sha256)
        if item.kind == "low_rank":
            adapter = self.sources.library.low_rank(item.adapter)
            entry["adapter"] = f"{_bare(item.adapter)}@{adapter.sha256[:12]}"
            self.artefacts.append(adapter.sha256)
        strength = entry.get("strength")
        if isinstance(strength, int | float):
            self.strengths.append(float(strength))
        entry["hook_points"] = [str(p) for p in sorted(blocks, key=forward_order)]
        if where is not None:
            entry["where"] = where.model_dump(mode="json", by_alias=True, exclude_none=True)
        if when is not None:
            entry["when"] = when.model_dump(mode="json", exclude_none=True, exclude={"vector"})
            gate = self.sources.vector(when.vector, "when")
            entry["when"]["vector"] = f"{gate.card.name or 'inline'}@{gate.sha256[:12]}"
        self.summary.append(entry)


def _bare(ref: str) -> str:
    """A reference without its hash: `name` and `name@hash` may mean the same."""
    return ref.partition("@")[0]
