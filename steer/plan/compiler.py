"""Specs to plans, in a straight line.

Every intervention is resolved, its strength becomes a number, added vectors are composed; then
each becomes blocks, the blocks are packed into rules, and what was done is described.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from steer.errors import SpecError, SteerError, pointer
from steer.model import Capabilities, forward_order
from steer.plan.checks import check_size
from steer.plan.composition import compose
from steer.plan.concepts import features_lit
from steer.plan.kinds import blocks_of, prepared
from steer.plan.plan import (
    AS_REQUESTED,
    EXPLAINING,
    Blocks,
    Gate,
    Rule,
    SteeringPlan,
    check_rules,
    read_elsewhere,
)
from steer.plan.resolve import OPEN, Compilation, Policy, Resolved, ResolvedGate, Resolver
from steer.plan.selection import NO_READER, Selection, TokenReader
from steer.plan.sources import Sources
from steer.plan.strengths import resolve_strength
from steer.references import put_at
from steer.spec import SteeringSpec, TokenVector


def compile_plan(
    spec: SteeringSpec,
    sources: Sources,
    capabilities: Capabilities,
    reader: TokenReader = NO_READER,
    *,
    policy: Policy = OPEN,
) -> SteeringPlan:
    """Compiles every intervention; raises all problems at once, as one `SteerError`.

    What `policy` does not allow in any place is refused before anything is looked up.
    """
    policy.check(spec)
    asked = Compilation(spec, sources, capabilities, reader, policy)
    problems = _Problems()
    resolver, resolved = Resolver(asked), list[Resolved]()
    for place, item in enumerate(spec.interventions):
        with problems.of(place):
            found = prepared(resolver.resolved(place, item))
            resolved.append(resolve_strength(found, asked))
    if spec.compose is not None:
        with problems.of_the_whole():
            resolved = compose(resolved)
    compiled: list[_Compiled] = []
    for one in resolved:
        with problems.of(one.place):
            compiled.append(_Compiled(one, _blocks(one, asked)))
    problems.raise_any()
    rules = _packed(compiled)
    limit = capabilities.limits.get("passes")
    if limit is not None:
        check_rules(len(rules), limit)
    return _plan(spec, rules, compiled)


_OF_THE_SPEC = ("/interventions", "/where", "/when", "/ramp")
"""How pointers begin that are already relative to the spec."""


class _Problems:
    """Errors by the intervention they were found in; a step that fails does not stop the others."""

    def __init__(self) -> None:
        self._errors: list[tuple[int, SteerError]] = []

    @contextmanager
    def of(self, place: int) -> Iterator[None]:
        """Keeps what is raised about the intervention at `place`, with a pointer into the spec."""
        try:
            yield
        except SteerError as error:
            if not str(error.param).startswith(_OF_THE_SPEC):
                error.param = pointer("interventions", place) + (error.param or "")
            self._errors.append((place, error))

    @contextmanager
    def of_the_whole(self) -> Iterator[None]:
        """Keeps what is raised about the spec as a whole; it is told first."""
        try:
            yield
        except SteerError as error:
            self._errors.append((-1, error))

    def raise_any(self) -> None:
        """Raises what was found, in the order of the interventions: as it is if it is one thing,
        otherwise as a `SpecError` that lists all."""
        errors = [error for _, error in sorted(self._errors, key=lambda found: found[0])]
        # What is wrong with the spec's own 'where' or 'when' is found once for each intervention.
        problems = list(dict.fromkeys(p for error in errors for p in error.problems))
        if len(errors) == 1 or len(problems) == 1:
            raise errors[0]
        if errors:
            raise SpecError(
                f"{problems[0].message} (and {len(problems) - 1} more problems)",
                param=problems[0].param,
                code=problems[0].code,
                problems=problems,
            )


class _Compiled(NamedTuple):
    one: Resolved
    blocks: Blocks


def _blocks(one: Resolved, asked: Compilation) -> Blocks:
    blocks = blocks_of(one)
    try:
        check_size(blocks, asked.sources.model)
    except SteerError as error:
        raise error.at(_size_param(one, asked.spec)) from None
    if asked.spec.norm == "preserve":
        blocks = {p: replace(block, preserve_norm=True) for p, block in blocks.items()}
    if one.fault is not None:
        raise one.fault
    if one.gate is not None:
        read = one.gate.gate.point
        early = [p for p in blocks if forward_order(p) < forward_order(read)]
        if early:
            raise SpecError(
                f"the gate reads {read}, after the edit at {early[0]}: gate on an earlier layer "
                "or edit later ones",
                param=one.gate.param,
                code="gate_after_edit",
            )
    return {} if one.ramp is not None and one.ramp.largest == 0 else blocks


def _size_param(one: Resolved, spec: SteeringSpec) -> str:
    """The field that says how large an edit is; what it names, where that is left to the card."""
    asked = spec.interventions[one.place]
    for name in ("strength", "value"):
        if getattr(asked, name, None) is not None:
            return pointer(name)
    return one.named[0][0].param


# Packing


@dataclass
class _OpenRule:
    selection: Selection
    gate: Gate | None
    blocks: Blocks = field(default_factory=dict)

    def fits(self, selection: Selection, gate: Gate | None) -> bool:
        mine = None if self.gate is None else self.gate.identity
        return self.selection == selection and mine == (None if gate is None else gate.identity)

    def meets(self, blocks: Blocks) -> bool:
        """Whether it edits at a point of `blocks`, or one of its edits reads elsewhere where one of
        theirs does."""
        reads = read_elsewhere(self.blocks) & read_elsewhere(blocks)
        return bool(reads) or not blocks.keys().isdisjoint(self.blocks)

    def fuse(self, blocks: Blocks) -> bool:
        """Adds constants; False where one of the blocks is not a constant."""
        shared = self.blocks.keys() & blocks.keys()
        if not shared or not all(self.blocks[p].is_shift and blocks[p].is_shift for p in shared):
            return False
        for point, block in blocks.items():
            self.blocks[point] = self.blocks[point].fused_with(block) if point in shared else block
        return True


def _packed(compiled: Iterable[_Compiled]) -> list[_OpenRule]:
    rules: list[_OpenRule] = []
    for one, blocks in compiled:
        if blocks:
            gate = None if one.gate is None else one.gate.gate
            _pack(rules, blocks, one.rule_selection, gate)
    return rules


def _pack(rules: list[_OpenRule], blocks: Blocks, selection: Selection, gate: Gate | None) -> None:
    """Puts `blocks` into the earliest rule after every rule that meets them."""
    last = max((n for n, one in enumerate(rules) if one.meets(blocks)), default=-1)
    if last >= 0 and rules[last].fits(selection, gate) and rules[last].fuse(blocks):
        return
    for one in rules[last + 1 :]:
        if one.fits(selection, gate):
            one.blocks.update(blocks)
            return
    rules.append(_OpenRule(selection, gate, dict(blocks)))


# Describing


def _plan(
    spec: SteeringSpec, rules: Sequence[_OpenRule], compiled: Sequence[_Compiled]
) -> SteeringPlan:
    """The plan; its fingerprint covers what was resolved, not how it was written."""
    summary = [_described(*one) for one in compiled]
    artefacts = [sha256 for one, _ in compiled for sha256 in _hashes(one)]
    strengths = [entry.get("strength") for entry in summary]
    return SteeringPlan(
        fingerprint=_fingerprint(spec, summary, artefacts),
        spec=spec,
        rules=tuple(Rule(one.selection, one.gate, one.blocks) for one in rules),
        artefacts=tuple(dict.fromkeys(artefacts)),
        strengths=tuple(float(one) for one in strengths if isinstance(one, int | float)),
        summary=tuple(summary),
    )


def _fingerprint(
    spec: SteeringSpec, summary: Sequence[dict[str, Any]], artefacts: Sequence[str]
) -> str:
    # A strength that was asked for in another way, but is the same, means the same.
    told = AS_REQUESTED | EXPLAINING
    kept = [{key: value for key, value in entry.items() if key not in told} for entry in summary]
    text = json.dumps([kept, artefacts], sort_keys=True, separators=(",", ":"))
    ways = str(spec.norm) + (f"+{spec.compose}" if spec.compose else "")
    return hashlib.sha256(f"steer/plan/1\n{ways}\n{text}".encode()).hexdigest()[:32]


def _hashes(one: Resolved) -> list[str]:
    gate = [] if one.gate is None else [one.gate.read.sha256]
    return gate + [found.sha256 for _, found in one.named]


def _described(one: Resolved, blocks: Blocks) -> dict[str, Any]:
    """The intervention as JSON, with what its references stood for and where it acts."""
    entry: dict[str, Any] = one.item.model_dump(
        mode="json",
        by_alias=True,
        exclude_none=True,
        exclude={"layers", "site", "where", "when", "ramp"},
    )
    for reference, found in one.named:
        if isinstance(reference.ref, TokenVector):
            put_at(entry, reference.param + "/token", found.card.provenance["token"])
            continue
        # A name may be another one for the same vector; SAEs and adapters are called as written.
        name = found.card.name if reference.kind == "vector" else (reference.name or "")
        put_at(entry, reference.param, _versioned(name.partition("@")[0], found.sha256))
    entry["hook_points"] = [str(p) for p in sorted(blocks, key=forward_order)]
    if one.where is not None:
        entry["where"] = one.where.model_dump(mode="json", by_alias=True, exclude_none=True)
    if one.gate is not None:
        entry["when"] = _gate_described(one.gate)
    if one.ramp is not None:
        entry["ramp"] = [list(point) for point in one.ramp.points]
    if (lit := features_lit(one)) is not None:
        entry["lit"] = lit
    if one.strength is not None:
        entry["requested"] = one.strength.requested
        if one.strength.capped:
            entry["capped"] = True
        if one.strength.above_null is False:
            entry["above_null"] = False
    return entry


def _gate_described(gate: ResolvedGate) -> dict[str, Any]:
    entry = gate.when.model_dump(mode="json", exclude_none=True)
    card, named = gate.read.card, getattr(gate.when, gate.field)
    if isinstance(named, TokenVector):
        entry["vector"]["token"] = card.provenance["token"]
        if named.lens is not None:
            name = named.lens.partition("@")[0]
            entry["vector"]["lens"] = _versioned(name, str(card.provenance["lens"]))
    else:
        name = card.name if gate.field == "vector" else gate.gate.name
        entry[gate.field] = _versioned(name, gate.read.sha256)
    return entry


def _versioned(name: str, sha256: str) -> str:
    return f"{name or 'inline'}@{sha256[:12]}"
