"""What ships for different models lies in one registry, and each model sees its own: also where
names are equal, whichever is served first."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from steer.engines.fake.engine import fake_model
from steer.engines.transformers.checkpoints.known import DEMO, SMOLLM2, KnownModel
from steer.model import ModelInfo
from steer.registry.registry import Registry
from steer.registry.shipped import add_library

WIDTHS = {DEMO: 192, SMOLLM2: 576}
TAKEN = {DEMO: "formal", SMOLLM2: "academic"}
"""A vector that ships for each, which is put under one name here."""


def info(known: KnownModel) -> ModelInfo:
    return fake_model(name=known.own_name, d_model=WIDTHS[known], n_layers=30).served_as(known.name)


def library(known: KnownModel, folder: Path) -> Path:
    """A library with one vector and one profile of its model, both called `polite`."""
    for part in ("vectors", "profiles"):
        (folder / part).mkdir(parents=True)
    source = known.shipped / "vectors" / f"{TAKEN[known]}.safetensors"
    shutil.copy(source, folder / "vectors" / "polite.safetensors")
    spec = {"interventions": [{"kind": "add", "vector": "polite"}]}
    profile = {"name": "polite", "spec": spec, "description": known.name}
    (folder / "profiles" / "polite.json").write_text(json.dumps(profile))
    return folder


@pytest.mark.parametrize(
    "order", [(DEMO, SMOLLM2), (SMOLLM2, DEMO)], ids=lambda order: order[0].name
)
def test_equal_names_are_each_models_own(order: tuple[KnownModel, ...], tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        for known in (*order, *order):  # as at every start
            shelf = tmp_path / known.library
            folder = shelf if shelf.is_dir() else library(known, shelf)
            add_library(registry.for_model(known.own_name, known.name), folder)
        assert len(registry.versions("vector", "polite")) == 2
        for known in order:
            here = registry.for_model(info(known))
            vector = here.vector("polite")
            assert (vector.card.model, vector.card.width) == (known.own_name, WIDTHS[known])
            assert [entry.name for entry in here.entries()] == ["polite"]
            assert [one.description for one in here.profiles()] == [known.name]
            assert here.profile("polite").description == known.name


@pytest.mark.parametrize("known", [DEMO, SMOLLM2], ids=lambda known: known.name)
def test_a_model_sees_all_that_ships_for_it_and_nothing_else(
    known: KnownModel, tmp_path: Path
) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        for one in (DEMO, SMOLLM2):
            add_library(registry.for_model(one.own_name, one.name), one.shipped)
        here = registry.for_model(info(known))
        shelf = known.shipped
        assert {entry.name for entry in here.entries(limit=1000)} == {
            path.stem
            for part in ("vectors", "relations", "saes", "oracles")
            for path in (shelf / part).glob("*")
            if path.is_dir() or path.suffix == ".safetensors"
        } - {"__pycache__"}
        assert {one.name for one in here.profiles()} == {
            path.stem for path in (shelf / "profiles").glob("*.json")
        }
