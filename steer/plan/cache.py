"""Plans by spec: compiled once for as long as the names in the spec mean the same artefacts."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import Library
from steer.errors import Problem, SteerError
from steer.model import Capabilities, ModelInfo
from steer.plan.compiler import compile_plan
from steer.plan.plan import SteeringPlan
from steer.plan.resolve import OPEN, Policy, Tokenize
from steer.plan.sources import EncodeText, Snapshot, Sources
from steer.spec import SteeringSpec


@dataclass
class PlanStats:
    """Counters of a `PlanCache`; they only grow."""

    hits: int = 0
    misses: int = 0
    compile_seconds: float = 0.0


class PlanCache:
    """Compiles specs for one model, as far as `policy` allows them, and remembers the plans of the
    newest artefacts.

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
        policy: Policy = OPEN,
    ) -> None:
        self._sources = Sources(library, model, encode_text)
        self._policy = policy
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
        sources = replace(self._sources, library=Snapshot(self._sources.library, vectors))
        key = self._key(spec, sources)
        with self._lock:
            if key is not None and key in self._plans:
                self.stats.hits += 1
                self._plans.move_to_end(key)
                return self._plans[key]
        started = time.perf_counter()
        plan = compile_plan(spec, sources, self._capabilities, self._tokenize, policy=self._policy)
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
            for reference in spec.references():
                if reference.name is not None:
                    key.append(sources.named(reference).sha256)
        except SteerError:
            return None
        return tuple(key)
