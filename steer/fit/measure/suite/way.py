"""A way to steer towards a concept, and how far it is turned."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias

from steer.errors import Unsupported
from steer.fit.measure.nulls.in_plans import added_vector, with_vector
from steer.fit.measure.nulls.matching import PlanAt
from steer.fit.measure.suite.file import SuiteConcept
from steer.plan.plan import SteeringPlan


@dataclass(frozen=True)
class Way:
    """The plan at factor 1, and at any factor; None where it cannot be turned."""

    plan: SteeringPlan
    at: PlanAt | None = None

    @staticmethod
    def of(plan: SteeringPlan) -> Way:
        """A plan of any spec: one that only adds can be turned."""
        try:
            vector = added_vector(plan)
        except Unsupported:
            return Way(plan)
        return Way(plan, lambda factor: with_vector(plan, vector, factor))


WayOf: TypeAlias = Callable[[SuiteConcept], Way]
"""A method: the way to steer towards each concept."""


def known_ways(ways: Mapping[str, Way]) -> WayOf:
    """The method whose ways, by the concepts' names, are there already."""
    return lambda concept: ways[concept.name]
