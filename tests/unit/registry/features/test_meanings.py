"""The vectors of labels: by content, by embedder, and gone with their SAE."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from steer.artefacts.sae.labels import FeatureLabel
from steer.registry.features.findings import BesideFiles
from steer.registry.features.meanings import EmbedderIdentity, MeaningStore, meaning_text
from steer.registry.features.store import SurveyStore

SAE = "a" * 64
WIDTH = 24
ONE = EmbedderIdentity("one", WIDTH)


@pytest.fixture
def store(tmp_path: Path) -> MeaningStore:
    return MeaningStore(BesideFiles(str(tmp_path)))


def labelled(*texts: str) -> dict[int, FeatureLabel]:
    return {feature: FeatureLabel(text=text) for feature, text in enumerate(texts)}


def rows(texts: Sequence[str], width: int = WIDTH) -> NDArray[np.float32]:
    """A random row of length 1 for each text, always the same."""
    found = [
        np.random.default_rng(list(text.encode())).normal(size=width).astype(np.float32)
        for text in texts
    ]
    return np.stack([row / np.linalg.norm(row) for row in found])


def embed(store: MeaningStore, labels: dict[int, FeatureLabel]) -> list[str]:
    texts = store.missing(SAE, ONE, labels)
    if texts:
        store.keep(SAE, ONE, texts, rows(texts))
    return texts


def test_the_nearest_are_those_of_a_float64_reference(store: MeaningStore) -> None:
    texts = [f"label {n % 37}" for n in range(60)]
    labels = labelled(*texts)
    assert embed(store, labels) == list(dict.fromkeys(texts))
    query = rows(["what is looked for"])[0]
    exact = rows(texts).astype(np.float64) @ query.astype(np.float64)
    found = store.nearest(SAE, ONE, labels, query, limit=60)
    assert (found.known, found.labels) == (60, 60)
    assert {one.feature for one in found.matches} == set(labels)
    assert [one.score for one in found.matches] == pytest.approx(
        [exact[one.feature] for one in found.matches], abs=1e-3
    )
    scores = [(-one.score, one.feature) for one in found.matches]
    assert scores == sorted(scores)
    few = store.nearest(SAE, ONE, labels, query, limit=3)
    assert few.matches == found.matches[:3]


def test_of_labels_that_say_the_same_the_one_that_acts_comes_first(store: MeaningStore) -> None:
    labels = {n: FeatureLabel(text="cats", effect=0.5 if n == 7 else None) for n in range(9)}
    embed(store, labels)
    found = store.nearest(SAE, ONE, labels, rows(["cats"])[0], limit=3).matches
    assert [one.feature for one in found] == [7, 0, 1]
    assert all(0.999 < one.score <= 1.0 for one in found)


def test_a_changed_label_is_a_new_one_and_a_returned_one_is_known(store: MeaningStore) -> None:
    first, second = labelled("cats", "dogs"), labelled("cats", "wolves")
    assert embed(store, first) == ["cats", "dogs"]
    assert embed(store, second) == ["wolves"]
    assert embed(store, first) == []
    found = store.nearest(SAE, ONE, labelled("cats", "foxes"), rows(["cats"])[0], limit=9)
    assert [one.feature for one in found.matches] == [0]
    assert (found.known, found.labels) == (1, 2)


def test_each_embedder_has_its_own(store: MeaningStore) -> None:
    labels = labelled("cats")
    embed(store, labels)
    for other in (EmbedderIdentity("two", WIDTH), EmbedderIdentity("one", 8)):
        assert store.missing(SAE, other, labels) == ["cats"]
    assert store.missing("b" * 64, ONE, labels) == ["cats"]


def test_what_no_label_says_any_longer_is_removed(store: MeaningStore) -> None:
    embed(store, labelled("cats"))
    embed(store, labelled("dogs"))
    assert store.drop_unused(SAE, ONE, labelled("dogs")) == 1
    assert store.missing(SAE, ONE, labelled("cats", "dogs")) == ["cats"]


def test_a_damaged_file_is_embedded_again(store: MeaningStore, tmp_path: Path) -> None:
    labels = labelled("cats", "dogs")
    embed(store, labels)
    [file] = (tmp_path / "features").rglob("*.safetensors")
    for damage in (file.read_bytes()[:-9], b"", b"\0" * 40):
        file.write_bytes(damage)
        fresh = MeaningStore(BesideFiles(str(tmp_path)))
        assert fresh.missing(SAE, ONE, labels) == ["cats", "dogs"]
        assert fresh.nearest(SAE, ONE, labels, rows(["cats"])[0], limit=9).known == 0
        assert embed(fresh, labels)


def test_they_go_with_their_sae(store: MeaningStore, tmp_path: Path) -> None:
    embed(store, labelled("cats"))
    surveys = SurveyStore(str(tmp_path))
    assert surveys.prune({SAE}) == 0
    assert surveys.prune(set()) == 1
    assert store.missing(SAE, ONE, labelled("cats")) == ["cats"]


def test_a_label_without_text_is_its_attribute() -> None:
    assert meaning_text(FeatureLabel(text=" ", attribute="language", direction="fr")) == (
        "language: fr"
    )
    assert meaning_text(FeatureLabel()) == ""
