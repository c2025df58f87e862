"""What a server allows of clients' specs: the same for a chat, an inspection and a job."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from steer.artefacts.library import Library
from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.errors import Unsupported, pointer
from steer.plan.cache import PlanCache
from steer.plan.kinds import StrengthLimit
from steer.spec import InlineVector, SteeringSpec

_VECTOR_FIELDS = ("vector", "remove", "add", "toward")


@dataclass(frozen=True)
class SpecPolicy:
    """Whether specs may carry vectors themselves, and what becomes of a strength outside its
    vector's calibrated range."""

    inline_vectors: bool = True
    strength_limit: StrengthLimit = "off"

    @property
    def measuring(self) -> SpecPolicy:
        """For what reports a strength as it was asked for: one that is capped would be reported
        falsely, so it is refused."""
        limit = self.strength_limit
        return replace(self, strength_limit="refuse" if limit == "cap" else limit)

    def plans(self, engine: Engine, library: Library, **options: Any) -> PlanCache:
        """Compiles specs under this limit of strengths; `options` are `PlanCache`'s."""
        return plans_of(engine, library, strength_limit=self.strength_limit, **options)

    def check(self, spec: SteeringSpec, at: str = "") -> None:
        """Raises `Unsupported` where `spec`, at the pointer `at`, carries vectors that may not
        come in it."""
        if self.inline_vectors:
            return
        for where, ref in vector_refs(spec):
            if isinstance(ref, InlineVector):
                raise Unsupported(
                    "this server takes no vectors inside requests: upload it to "
                    "/v1/steering/vectors and give its name",
                    param=at + where,
                    code="inline_vectors_disabled",
                )


def vector_refs(spec: SteeringSpec) -> Iterator[tuple[str, str | InlineVector]]:
    """Every vector the spec refers to, gates included, with its pointer in the spec."""
    for place, item in enumerate(spec.interventions):
        for name in _VECTOR_FIELDS:
            ref = getattr(item, name, None)
            if isinstance(ref, str | InlineVector):
                yield pointer("interventions", place, name), ref
        if item.when is not None:
            yield pointer("interventions", place, "when", "vector"), item.when.vector
    if spec.when is not None:
        yield "/when/vector", spec.when.vector
