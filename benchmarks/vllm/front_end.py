"""What the front end does for one request, against the number of registered vectors."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.vllm.diets import Spec
from benchmarks.vllm.shapes import CAPABILITIES, Shape
from steer.artefacts.control_vector import ControlVector
from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.plan.cache import PlanCache
from steer.registry.blobs.plan_store import PlanStore
from steer.registry.catalogue.catalogue import row_of
from steer.registry.catalogue.schema import artefacts
from steer.registry.entry import Entry
from steer.registry.registry import Registry
from steer.spec import parse_spec

REQUESTS = 64
_CONTENTS = 64


@dataclass(frozen=True)
class FrontEnd:
    """Seconds per request, medians: for a spec that was seen before, and for a new one that is
    compiled and whose plan is written to the store; and per name, when names are registered."""

    known: float
    new: float
    register: float


def fill(folder: Path, shape: Shape, names: int) -> float:
    """A registry of `names` vectors, `n0` …, of one layer each; the seconds per name.

    The first 64 are registered one by one. The others are catalogued in one transaction under the
    contents of these: one name costs a lookup what another does, whichever file it stands for.
    """
    generator = torch.Generator().manual_seed(4)
    entries: list[Entry] = []
    with Registry.open(folder) as registry:
        started = time.perf_counter()
        for n in range(min(names, _CONTENTS)):
            row = torch.randn(shape.d_model, generator=generator) / shape.d_model**0.5
            vector = ControlVector.of({shape.middle: row})
            entries.append(registry.add(f"n{n}", vector)[0])
        seconds = (time.perf_counter() - started) / len(entries)
        rest = [
            {**row_of(entries[n % len(entries)]), "name": f"n{n}"}
            for n in range(len(entries), names)
        ]
        if rest:
            with registry._catalogue.writing() as connection:
                connection.execute(artefacts.insert(), rest)
    return seconds


def spec(shape: Shape, names: int, number: int, strength: float = 0.05) -> Spec:
    """The spec of a request, each with another strength; a batch names vectors from all over the
    registry."""
    item = {
        "kind": "add",
        "vector": f"n{number * max(names // REQUESTS, 1) % names}",
        "strength": round(strength + 1e-5 * number, 5),
        "layers": [shape.middle],
    }
    return {"interventions": [item], "where": {"phases": ["prompt", "generation"]}}


def measure(folder: Path, shape: Shape, names: int, rounds: int) -> FrontEnd:
    """The way of a request from its JSON to its ticket, in a registry that `fill` made."""
    register = fill(folder, shape, names)
    seconds: tuple[list[float], list[float]] = ([], [])
    with Registry.open(folder) as registry:
        plans = PlanCache(registry, shape.info(), CAPABILITIES, size=4 * REQUESTS)
        issuer = TicketIssuer(PlanStore(folder))
        for number in range(rounds + 1):
            for again in (False, True):
                for n in range(REQUESTS):
                    asked = spec(shape, names, n, strength=0.05 + 1e-3 * number)
                    started = time.perf_counter()
                    issuer.issue(plans.plan(parse_spec(asked))).as_extra_args()
                    if number:
                        seconds[again].append(time.perf_counter() - started)
    new, known = map(statistics.median, seconds)
    return FrontEnd(known, new, register)
