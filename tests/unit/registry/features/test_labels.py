"""Labels beside an SAE: by source, in their order, whole or refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from steer.artefacts.sae.labels import FeatureLabel, search_labels
from steer.errors import SteerError
from steer.registry.features.findings import BesideFiles
from steer.registry.features.labels import LabelStore

SAE = "ab" * 32
OWN = {1: FeatureLabel(text="own one", effect=0.5), 2: FeatureLabel(text="own two")}


@pytest.fixture
def store(tmp_path: Path) -> LabelStore:
    return LabelStore(BesideFiles(str(tmp_path)))


def texts(*pairs: tuple[int, str]) -> dict[int, FeatureLabel]:
    return {feature: FeatureLabel(text=text) for feature, text in pairs}


def test_what_was_imported_stands_first_and_what_was_made_last(store: LabelStore) -> None:
    store.keep(SAE, "a-model", "labeller", texts((1, "asked"), (3, "asked")))
    store.keep(SAE, "exemplars", "exemplars", texts((1, "seen"), (3, "seen"), (4, "seen")))
    store.keep(SAE, "np", "imported", texts((1, "brought\nalong")))
    known = store.known(SAE, OWN)
    assert list(known) == [1, 2, 3, 4]
    assert len(known) == 4
    assert [one.text for one in known.every(1)] == ["brought\nalong", "own one", "asked", "seen"]
    shown = known[1]
    # What was measured stays with the feature, whatever it is called.
    assert (shown.text, shown.source, shown.effect) == ("brought\nalong", "np", 0.5)
    assert (known[2].source, known[3].source, known[4].source) == (None, "a-model", "exemplars")
    assert 5 not in known
    assert [one.feature for one in search_labels(known, "asked seen")] == [3, 4]


def test_a_source_takes_more_labels_and_newer_ones(store: LabelStore) -> None:
    store.keep(SAE, "np", "imported", texts((1, "old"), (2, "two")))
    assert store.known(SAE, {})[1].text == "old"
    kept = store.keep(SAE, "np", "imported", texts((1, "new"), (3, "three")))
    assert kept.labels == 3
    assert {n: one.text for n, one in store.known(SAE, {}).items()} == {
        1: "new",
        2: "two",
        3: "three",
    }
    store.remove(SAE, "np")
    assert dict(store.known(SAE, {})) == {}


def test_a_source_has_one_kind_of_label(store: LabelStore) -> None:
    store.keep(SAE, "mine", "exemplars", texts((1, "seen")))
    with pytest.raises(SteerError, match="another source") as raised:
        store.keep(SAE, "mine", "imported", texts((1, "brought")))
    assert (raised.value.code, raised.value.param) == ("invalid_labels", "/source")


@pytest.mark.parametrize("name", ["", "..", "a/b", "../x", "a@0123456", "-"])
def test_a_source_is_no_path(store: LabelStore, name: str) -> None:
    with pytest.raises(SteerError) as raised:
        store.keep(SAE, name, "imported", texts((1, "a")))
    assert raised.value.code == "invalid_name"


def test_a_source_that_is_not_there_is_named(store: LabelStore) -> None:
    store.keep(SAE, "np", "imported", texts((1, "a")))
    with pytest.raises(SteerError, match="'np'") as raised:
        store.remove(SAE, "other")
    assert raised.value.code == "unknown_labels"


@pytest.mark.parametrize("kept", [0, 5, -1, -20, -40])
def test_damaged_labels_are_named(store: LabelStore, kept: int) -> None:
    store.keep(SAE, "np", "imported", texts((1, "first label"), (2, "second label")))
    data = store.files.read(SAE, "labels", "np.jsonl")
    store.files.write(data[:kept], SAE, "labels", "np.jsonl")
    with pytest.raises(SteerError, match="'np' are damaged") as raised:
        dict(store.known(SAE, {}))
    assert raised.value.code == "damaged_labels"
