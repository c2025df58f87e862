"""A spec made ready to run: names resolved, widths checked, programs compiled, order fixed.

A plan is a short list of *passes*. A pass has one selection of tokens, at most one gate, and at
most one block per hook point; at a hook point the passes run in order. Interventions are packed
greedily into the earliest pass that keeps the order the spec lists; neighbouring constant adds
fuse into one row. So a token needs one slot number per pass, however long the spec is.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor

from steer import compiler
from steer.compiler import Blocks, EncodeText, Sources
from steer.control_vector import ControlVector
from steer.edits import Block
from steer.errors import IncompatibleArtefact, Problem, SpecError, SteerError, Unsupported, pointer
from steer.model_info import Capabilities, HookPoint, ModelInfo, forward_order
from steer.positions import Selection, resolve
from steer.registry.library import Library
from steer.spec import InlineVector, Intervention, SteeringSpec, VectorRef, When

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True)
class Gate:
    """A condition on the residual stream: open where above < value < below.

    `direction` is a unit row `[d]`; the value is the cosine, or the projection.
    """

    name: str
    point: HookPoint
    direction: Tensor
    above: float
    below: float
    cosine: bool
    prompt_scope: bool

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.name, self.point, self.above, self.below, self.cosine, self.prompt_scope)


@dataclass(frozen=True)
class Pass:
    """Blocks that share a selection and a gate, at most one per hook point."""

    selection: Selection
    gate: Gate | None
    blocks: Mapping[HookPoint, Block]


@dataclass(frozen=True)
class SteeringPlan:
    """What an engine needs to carry out one spec; identified by `fingerprint`."""

    fingerprint: str
    spec: SteeringSpec
    passes: tuple[Pass, ...]
    artefacts: tuple[str, ...]
    strengths: tuple[float, ...]
    summary: tuple[Mapping[str, Any], ...]

    @property
    def points(self) -> tuple[HookPoint, ...]:
        """Every hook point that is edited, in forward order."""
        return tuple(sorted({p for one in self.passes for p in one.blocks}, key=forward_order))

    @property
    def gated(self) -> bool:
        return any(one.gate is not None for one in self.passes)

    def first_steered(self, prompt: tuple[int, ...], horizon: int) -> int | None:
        """The first position whose state this plan may change: KV before it can be shared."""
        firsts = [one.selection.first(prompt, horizon) for one in self.passes]
        return min((first for first in firsts if first is not None), default=None)

    def describe(self) -> dict[str, Any]:
        """What would be applied where, for people and for `/v1/steering/validate`."""
        return {
            "fingerprint": self.fingerprint,
            "passes": len(self.passes),
            "hook_points": [{"layer": p.layer, "site": p.site} for p in self.points],
            "interventions": [dict(entry) for entry in self.summary],
        }


@dataclass
class PlanStats:
    """Counters of a `PlanCache`; they only grow."""

    hits: int = 0
    misses: int = 0
    compile_seconds: float = 0.0


class PlanCache:
    """Compiles specs for one model, and remembers the plans of the newest artefacts.

    Assumes: `library` and `encode_text` may be called from any thread.
    Guarantees: equal meaning gives equal fingerprints; a name that comes to mean another version
    is compiled anew; safe from any thread.
    """

    def __init__(
        self,
        library: Library,
        model: ModelInfo,
        capabilities: Capabilities,
        *,
        tokenize: Tokenize | None = None,
        encode_text: EncodeText | None = None,
        size: int = 1024,
        observe_compile: Callable[[float], None] | None = None,
    ) -> None:
        self._sources = Sources(library, model, encode_text)
        self._capabilities = capabilities
        self._tokenize = tokenize
        self._size = size
        self._observe_compile = observe_compile
        self._plans: OrderedDict[tuple[str, ...], SteeringPlan] = OrderedDict()
        self._lock = threading.Lock()
        self.stats = PlanStats()

    def plan(
        self, spec: SteeringSpec, *, vectors: Mapping[str, ControlVector] | None = None
    ) -> SteeringPlan:
        """The plan of `spec`; `vectors` holds artefacts that only this request knows.

        Raises `SteerError` with a pointer relative to the spec; `SpecError.problems` lists all.
        """
        sources = replace(self._sources, overlay=vectors)
        key = self._key(spec, sources)
        with self._lock:
            if key is not None and key in self._plans:
                self.stats.hits += 1
                self._plans.move_to_end(key)
                return self._plans[key]
        started = time.perf_counter()
        plan = compile_plan(spec, sources, self._capabilities, self._tokenize)
        seconds = time.perf_counter() - started
        with self._lock:
            self.stats.misses += 1
            self.stats.compile_seconds += seconds
            if key is not None:
                self._plans[key] = plan
                while len(self._plans) > self._size:
                    self._plans.popitem(last=False)
        if self._observe_compile is not None:
            self._observe_compile(seconds)
        return plan

    def check(self, spec: SteeringSpec) -> list[Problem]:
        """Everything that would make `plan` refuse `spec`; empty when nothing does."""
        try:
            self.plan(spec)
        except SteerError as error:
            return list(error.problems)
        return []

    def _key(self, spec: SteeringSpec, sources: Sources) -> tuple[str, ...] | None:
        """Identifies the spec together with what its names mean now; None where one is unknown."""
        key = [spec.fingerprint()]
        try:
            for kind, ref in _named_artefacts(spec):
                if kind == "vector":
                    key.append(sources.vector(ref, kind).sha256)
                elif kind == "sae":
                    key.append(sources.library.sae(ref).sha256)
                else:
                    key.append(sources.library.low_rank(ref).sha256)
        except SteerError:
            return None
        return tuple(key)


def compile_plan(
    spec: SteeringSpec,
    sources: Sources,
    capabilities: Capabilities,
    tokenize: Tokenize | None = None,
) -> SteeringPlan:
    """Compiles every intervention; raises all problems at once, as one `SteerError`."""
    draft = _Draft(spec, sources, capabilities, tokenize)
    errors: list[SteerError] = []
    for place, item in enumerate(spec.interventions):
        try:
            draft.append(place, item)
        except SteerError as error:
            errors.append(error.at(""))
            at = pointer("interventions", place)
            if not str(error.param).startswith(("/interventions", "/where", "/when")):
                error.param = at + (error.param or "")
    if len(errors) == 1:
        raise errors[0]
    if errors:
        problems = [problem for error in errors for problem in error.problems]
        raise SpecError(
            f"{problems[0].message} (and {len(problems) - 1} more problems)",
            param=problems[0].param,
            code=problems[0].code,
            problems=problems,
        )
    return draft.finished()


@dataclass
class _OpenPass:
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
        self.passes: list[_OpenPass] = []
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

    def finished(self) -> SteeringPlan:
        """The plan; its fingerprint covers what was resolved, not how it was written."""
        text = json.dumps(self.summary, sort_keys=True, separators=(",", ":"))
        digest = hashlib.sha256(f"steer/plan/1\n{self.spec.norm}\n{text}".encode()).hexdigest()
        passes = tuple(Pass(p.selection, p.gate, p.blocks) for p in self.passes)
        return SteeringPlan(
            fingerprint=digest[:32],
            spec=self.spec,
            passes=passes,
            artefacts=tuple(dict.fromkeys(self.artefacts)),
            strengths=tuple(self.strengths),
            summary=tuple(self.summary),
        )

    def _blocks(self, item: Intervention) -> Blocks:
        compile_kind: Callable[[Any, Sources], Blocks] = getattr(compiler, item.kind)
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
        vector = getattr(item, "vector", None)
        if vector is None or item.kind == "patch":
            return None
        return self.sources.vector(vector, "vector").card.default_where

    def _gate(self, when: When, at: str, blocks: Blocks) -> Gate:
        vector = self.sources.vector(when.vector, "when/vector")
        layer = vector.card.used_layers[0] if when.layer is None else when.layer
        point = HookPoint(layer, vector.card.site)
        self.sources.model.check_point(point, param=at)
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
        direction = compiler.row(vector, layer)
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
        """Puts `blocks` into the earliest pass after every pass that touches their points."""
        if not blocks:
            return
        last = max(
            (n for n, one in enumerate(self.passes) if not blocks.keys().isdisjoint(one.blocks)),
            default=-1,
        )
        if last >= 0 and self.passes[last].fits(selection, gate) and self._fuse(last, blocks):
            return
        for one in self.passes[last + 1 :]:
            if one.fits(selection, gate):
                one.blocks.update(blocks)
                return
        self.passes.append(_OpenPass(selection, gate, dict(blocks)))

    def _fuse(self, last: int, blocks: Blocks) -> bool:
        """Adds constants into pass `last`; False where one of the blocks is not a constant."""
        target = self.passes[last].blocks
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
            entry["sae"] = f"{item.sae}@{sae.sha256[:12]}"
            self.artefacts.append(sae.sha256)
        if item.kind == "low_rank":
            adapter = self.sources.library.low_rank(item.adapter)
            entry["adapter"] = f"{item.adapter}@{adapter.sha256[:12]}"
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


def _named_artefacts(spec: SteeringSpec) -> list[tuple[str, str]]:
    """Every artefact that the spec names, with its kind."""
    found: list[tuple[str, str]] = []
    gates = [spec.when, *(item.when for item in spec.interventions)]
    found += [("vector", gate.vector) for gate in gates if gate and isinstance(gate.vector, str)]
    for item in spec.interventions:
        for name in ("vector", "remove", "add", "toward"):
            ref = getattr(item, name, None)
            if isinstance(ref, str):
                found.append(("vector", ref))
        if isinstance(item, compiler.Clamp | compiler.Concept):
            found.append(("sae", item.sae))
        if isinstance(item, compiler.LowRank):
            found.append(("low_rank", item.adapter))
    return found
