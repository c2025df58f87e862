"""Every kind of write to a registry, on a base state in which each has something to do."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import torch

from steer.artefacts.control_vector import ControlVector
from steer.registry.profiles import Profile
from steer.registry.registry import Registry

Write = Callable[[Registry], object]


def a_vector(value: float, **card: object) -> ControlVector:
    return ControlVector.of({0: torch.full((4,), value)}, **card)


def using(ref: str) -> dict[str, object]:
    return {"interventions": [{"kind": "add", "vector": ref}]}


def prepare(registry: Registry) -> None:
    """Live and removed names, an alias, tags, a profile."""
    registry.add("v", a_vector(1))
    registry.add("v", a_vector(2))
    registry.add("w", a_vector(3))
    registry.change_tags("vector", "w", add=["old"])
    registry.set_alias("vector", "stable", f"v@{a_vector(1).sha256}")
    registry.put_profile(Profile(name="p", spec=using("stable")))
    for value in (4.0, 5.0):
        registry.add("gone", a_vector(value))
    registry.change_tags("vector", "gone", add=["bygone"])
    registry.add("same", a_vector(4))
    registry.remove("vector", "gone")


def archive(folder: Path) -> bytes:
    """What another registry exported."""
    with Registry.open(folder) as other:
        other.add("v", a_vector(6))
        other.add("new", a_vector(7))
        other.add("new", a_vector(8))
        other.set_alias("vector", "fresh", "new")
        other.change_tags("vector", "new", add=["imported"])
        other.put_profile(Profile(name="q", spec=using("fresh")))
        target = io.BytesIO()
        other.export_archive(target)
    return target.getvalue()


def writes(exported: bytes) -> dict[str, Write]:
    """One of each, by name. Each is one step for whoever looks, save for a collection."""
    return {
        "add": lambda r: r.add("new", a_vector(9, tags=("card",))),
        "add a version": lambda r: r.add("w", a_vector(9)),
        "add content that is there": lambda r: r.add("copy", a_vector(1)),
        "remove": lambda r: r.remove("vector", "w"),
        "remove a version": lambda r: r.remove("vector", f"v@{a_vector(2).sha256}"),
        "restore": lambda r: r.restore("vector", "gone"),
        "alias": lambda r: r.set_alias("vector", "fresh", "w"),
        "move an alias": lambda r: r.set_alias("vector", "stable", "w"),
        "tag": lambda r: r.change_tags("vector", "w", add=["a", "b"], remove=["old"]),
        "profile": lambda r: r.put_profile(Profile(name="q", spec=using("v")), pin=True),
        "replace a profile": lambda r: r.put_profile(Profile(name="p", spec=using("w"))),
        "remove a profile": lambda r: r.remove_profile("p"),
        "import": lambda r: r.import_archive(io.BytesIO(exported)),
        "collect": lambda r: r.collect_garbage(grace_seconds=0),
    }


NAMES = tuple(writes(b""))
