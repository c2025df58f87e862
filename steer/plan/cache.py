"""Plans by spec: compiled once for as long as the names in the spec mean the same artefacts."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias, TypeVar

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import DatedLibrary, Library
from steer.artefacts.token_direction import ReadToken, TokenDirections
from steer.errors import Problem, SteerError
from steer.model import Capabilities, ModelInfo
from steer.plan.compiler import compile_plan
from steer.plan.plan import SteeringPlan
from steer.plan.resolve import OPEN, Policy, Tokenize
from steer.plan.selection import TokenReader
from steer.plan.sources import EncodeText, Snapshot, Sources
from steer.spec import SteeringSpec

_Key: TypeAlias = tuple[str, ...]
"""A spec's fingerprint, and the hashes of what its names mean."""

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


@dataclass
class PlanStats:
    """Counters of a `PlanCache`; they only grow."""

    hits: int = 0
    misses: int = 0
    compile_seconds: float = 0.0


class PlanCache:
    """Compiles specs for one model, as far as `policy` allows them, and remembers the plans of the
    newest artefacts.

    Assumes: `library`, `encode_text` and `read_token` may be called from any thread.
    Guarantees: equal meaning gives equal fingerprints; a name that comes to mean another version
    is compiled anew; as long as a `DatedLibrary` says that nothing has changed, no name is looked
    up twice; safe from any thread.
    """

    def __init__(
        self,
        library: Library,
        model: ModelInfo,
        capabilities: Capabilities,
        *,
        tokenize: Tokenize | None = None,
        vocabulary: Callable[[], Sequence[bytes]] | None = None,
        encode_text: EncodeText | None = None,
        read_token: ReadToken | None = None,
        size: int = 1024,
        observe_compile: Callable[[float], None] | None = None,
        policy: Policy = OPEN,
    ) -> None:
        directions = None if read_token is None else TokenDirections(model, read_token)
        self._sources = Sources(library, model, encode_text, directions)
        self._policy = policy
        self._capabilities = capabilities
        self._reader = TokenReader(tokenize, vocabulary, capabilities.roles, model.vocab_size)
        self._size = size
        self._observe_compile = observe_compile
        self._dated = library if isinstance(library, DatedLibrary) else None
        self._plans: OrderedDict[_Key, SteeringPlan] = OrderedDict()
        self._meant: OrderedDict[str, tuple[int, _Key]] = OrderedDict()
        """By a spec's fingerprint: what its names meant in which state of the library."""
        self._lock = threading.Lock()
        self.stats = PlanStats()

    def plan(
        self, spec: SteeringSpec, *, vectors: Mapping[str, ControlVector] | None = None
    ) -> SteeringPlan:
        """The plan of `spec`; `vectors` holds artefacts that only this request knows.

        Raises `SteerError` with a pointer relative to the spec; `SpecError.problems` lists all.
        """
        state = None if self._dated is None or vectors else self._dated.state()
        settled = None if state is None else self._settled(spec, state)
        if settled is not None:
            return settled
        sources = replace(self._sources, library=Snapshot(self._sources.library, vectors))
        key = self._key(spec, sources)
        with self._lock:
            if key is not None and state is not None:
                _remember(self._meant, spec.fingerprint(), (state, key), self._size)
            if key is not None and key in self._plans:
                self.stats.hits += 1
                self._plans.move_to_end(key)
                return self._plans[key]
        started = time.perf_counter()
        plan = compile_plan(spec, sources, self._capabilities, self._reader, policy=self._policy)
        seconds = time.perf_counter() - started
        with self._lock:
            self.stats.misses += 1
            self.stats.compile_seconds += seconds
            if key is not None:
                _remember(self._plans, key, plan, self._size)
        if self._observe_compile is not None:
            self._observe_compile(seconds)
        return plan

    def at_once(self, spec: SteeringSpec) -> SteeringPlan | None:
        """The plan of `spec` where it is held and finding it waits for no other machine and no
        file; None says nothing of the spec."""
        if self._dated is None or not self._dated.local:
            return None
        return self._settled(spec, self._dated.state())

    def check(self, spec: SteeringSpec) -> list[Problem]:
        """Everything that would make `plan` refuse `spec`; empty when nothing does."""
        try:
            self.plan(spec)
        except SteerError as error:
            return list(error.problems)
        return []

    def _settled(self, spec: SteeringSpec, state: int) -> SteeringPlan | None:
        """The plan that is held of a spec whose names were looked up in this state."""
        assert self._dated is not None
        fingerprint = spec.fingerprint()
        with self._lock:
            then, key = self._meant.get(fingerprint, (None, ()))
            plan = self._plans.get(key)
            if plan is None or then != state:
                return None
            self.stats.hits += 1
            self._plans.move_to_end(key)
            self._meant.move_to_end(fingerprint)
        self._dated.keep(key[1:])
        return plan

    def _key(self, spec: SteeringSpec, sources: Sources) -> _Key | None:
        """Identifies the spec together with what its names mean now; None where one is unknown."""
        key = [spec.fingerprint()]
        try:
            for reference in spec.references():
                if reference.name is not None:
                    key.append(sources.named(reference).sha256)
        except SteerError:
            return None
        return tuple(key)


def _remember(kept: OrderedDict[K, V], key: K, value: V, size: int) -> None:
    kept[key] = value
    kept.move_to_end(key)
    while len(kept) > size:
        kept.popitem(last=False)
