"""Names of several models in PostgreSQL: the same meaning, lists and profiles as in SQLite."""

from __future__ import annotations

import pytest
import torch
from object_store import ObjectStore
from postgres_server import PostgresServer

from steer.artefacts.control_vector import ControlVector
from steer.engines.fake.engine import fake_model
from steer.registry.profiles import Profile
from steer.registry.registry import Registry

pytestmark = pytest.mark.slow

WIDTHS = {"A": 4, "B": 6}


def test_a_name_and_a_profile_are_each_models_own(
    postgres: PostgresServer, store: ObjectStore
) -> None:
    spec = {"interventions": [{"kind": "add", "vector": "formal"}]}
    with Registry.open(store.url(), catalogue=postgres.url()) as registry:
        views = {
            name: registry.for_model(fake_model(name=f"org/{name}", d_model=width))
            for name, width in WIDTHS.items()
        }
        for name, width in WIDTHS.items():
            row = torch.ones(width)
            views[name].add("formal", ControlVector.of({0: row}, model=f"hub/{name}"))
            views[name].put_profile(Profile(name="polite", spec=spec))
        registry.add("formal", ControlVector.of({0: 2 * torch.ones(4)}))  # of A's width, for all
        versions = {name: view.entry("vector", "formal").version for name, view in views.items()}
        assert versions == {"A": 3, "B": 2}
        for name, view in views.items():
            assert [e.version for e in view.entries("vector")] == [versions[name]]
            assert [e.version for e in view.entries(model="B")] == [2]
            assert [one.model for one in view.profiles()] == [name]
            assert view.profile("polite").model == name
        views["B"].remove_profile("polite")
        assert [one.model for one in registry.profiles()] == ["A"]
