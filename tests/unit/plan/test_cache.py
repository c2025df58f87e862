"""What a request asks of its library, and how often."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import EVERYTHING, random_vector, shape_of

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import DatedLibrary, MemoryLibrary
from steer.errors import SpecError
from steer.plan.cache import PlanCache
from steer.registry.registry import Registry
from steer.spec import parse_spec

SPEC = {
    "interventions": [
        {"kind": "add", "vector": "v"},
        {"kind": "ablate", "vector": "w", "when": {"vector": "v", "above": 0.1, "layer": 0}},
    ]
}


@dataclass(frozen=True)
class Shelf(MemoryLibrary):
    """A dated library that notes what it is asked; each of its `changes` gives it another state."""

    vectors: dict[str, ControlVector] = field(
        default_factory=lambda: {"v": random_vector(1, 1), "w": random_vector(2, 1)}
    )
    local: bool = True
    changes: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    kept: list[str] = field(default_factory=list)

    def vector(self, ref: str) -> ControlVector:
        self.asked.append(ref)
        return super().vector(ref)

    def state(self) -> int:
        self.asked.append("state")
        return len(self.changes)

    def keep(self, sha256s: Any) -> None:
        self.kept.extend(sha256s)


def cache(library: Any, **options: Any) -> PlanCache:
    return PlanCache(library, shape_of(), EVERYTHING, **options)


def test_a_known_spec_is_looked_up_no_more_until_something_changes() -> None:
    shelf = Shelf()
    assert isinstance(shelf, DatedLibrary)
    plans = cache(shelf)
    first = plans.plan(parse_spec(SPEC))
    assert sorted(shelf.asked) == ["state", "v", "w"]
    shelf.asked.clear()
    assert plans.plan(parse_spec(SPEC)) is first
    assert shelf.asked == ["state"]
    assert set(shelf.kept) == {shelf.vectors["v"].sha256, shelf.vectors["w"].sha256}
    shelf.changes.append("something that the spec does not name")
    shelf.asked.clear()
    assert plans.plan(parse_spec(SPEC)) is first
    assert sorted(shelf.asked) == ["state", "v", "w"]
    assert (plans.stats.hits, plans.stats.misses) == (2, 1)


def test_a_name_that_means_something_else_is_compiled_anew() -> None:
    shelf = Shelf()
    plans = cache(shelf)
    before = plans.plan(parse_spec(SPEC))
    shelf.vectors["v"] = random_vector(3, 1)
    shelf.changes.append("v")
    after = plans.plan(parse_spec(SPEC))
    assert after.fingerprint != before.fingerprint
    del shelf.vectors["v"]
    shelf.changes.append("v")
    with pytest.raises(SpecError, match="no vector named 'v'"):
        plans.plan(parse_spec(SPEC))


def test_a_requests_own_vectors_are_never_taken_for_the_librarys() -> None:
    plans = cache(Shelf())
    shared, mine = plans.plan(parse_spec(SPEC)), {"v": random_vector(9, 1)}
    assert plans.plan(parse_spec(SPEC), vectors=mine).fingerprint != shared.fingerprint
    assert plans.plan(parse_spec(SPEC)) is shared
    assert plans.at_once(parse_spec(SPEC)) is shared


@pytest.mark.parametrize("local", [True, False])
def test_only_what_is_held_and_near_is_there_at_once(local: bool) -> None:
    shelf = Shelf(local=local)
    plans = cache(shelf)
    assert plans.at_once(parse_spec(SPEC)) is None
    held = plans.plan(parse_spec(SPEC))
    shelf.asked.clear()
    assert plans.at_once(parse_spec(SPEC)) is (held if local else None)
    assert shelf.asked == (["state"] if local else [])
    shelf.changes.append("v")
    assert plans.at_once(parse_spec(SPEC)) is None
    assert cache(MemoryLibrary(shelf.vectors)).at_once(parse_spec(SPEC)) is None


def test_no_more_specs_are_kept_than_plans() -> None:
    plans = cache(Shelf(), size=2)
    first, *_ = specs = [
        parse_spec({"interventions": [{"kind": "add", "vector": "v", "strength": n}]})
        for n in (1, 2, 3)
    ]
    for spec in specs:
        plans.plan(spec)
    assert plans.at_once(first) is None
    assert [plans.at_once(one) is None for one in specs[1:]] == [False, False]


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    with Registry.open(tmp_path / "registry") as opened:
        opened.add("v", random_vector(1, 1))
        opened.add("w", random_vector(2, 1))
        yield opened


def test_a_registry_is_asked_for_its_state_alone(
    registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert registry.local
    plans = cache(registry)
    held = plans.plan(parse_spec(SPEC))
    monkeypatch.setattr(registry, "load", None)
    monkeypatch.setattr(registry, "entry", None)
    assert plans.plan(parse_spec(SPEC)) is held
    monkeypatch.undo()
    row = ControlVector.of({0: torch.ones(16)})
    registry.add("v", row)
    assert plans.at_once(parse_spec(SPEC)) is None
    assert plans.plan(parse_spec(SPEC)).fingerprint != held.fingerprint


def test_what_a_kept_plan_names_stays_leased(
    registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plans = cache(registry)
    plans.plan(parse_spec(SPEC))
    leased: list[str] = []
    monkeypatch.setattr(registry._leases, "take", leased.append)
    plans.plan(parse_spec(SPEC))
    assert set(leased) == {registry.vector(name).sha256 for name in "vw"}
