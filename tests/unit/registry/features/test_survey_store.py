"""Surveys beside their SAEs: whole or not at all, and gone with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from steer.errors import StorageError, UnknownArtefact
from steer.registry.features.store import SurveyStore
from steer.registry.features.survey import ACTIVE_NONE, SurveyCard
from steer.registry.registry import Registry

SAE = "ab" * 32
CARD = SurveyCard(
    sae=SAE,
    model="m",
    layer=1,
    site="resid_post",
    d_sae=4,
    texts=1,
    tokens=8,
    data="d",
    vocabulary={7: "x"},
)


@pytest.fixture
def store(tmp_path: Path) -> SurveyStore:
    return SurveyStore(str(tmp_path / "registry"))


def active(*tokens: tuple[int, ...]) -> np.ndarray:
    rows = [[*token, *[ACTIVE_NONE] * (3 - len(token))] for token in tokens]
    return np.array(rows, np.int32)


def test_features_that_fire_together(store: SurveyStore, tmp_path: Path) -> None:
    tokens = active((0, 1), (0, 1), (0, 1, 2), (0,), (2,), (3,), (3,), ())
    store.keep(CARD, {"active_feature": tokens}, tmp_path)
    survey = store.of(SAE, "s")
    assert survey.card == CARD
    (one,) = survey.together(1)  # 2 met it once only
    assert (one.feature, one.together) == (0, 3)
    assert one.jaccard == pytest.approx(3 / 4)
    assert one.lift == pytest.approx(3 * 7 / (4 * 3))


def test_without_a_survey_the_error_says_how_to_make_one(store: SurveyStore) -> None:
    assert store.find(SAE) is None
    with pytest.raises(UnknownArtefact, match="steer sae survey s") as raised:
        store.of(SAE, "s")
    assert raised.value.code == "no_survey"


@pytest.mark.parametrize("kept", [0, 4, 30, -1])
def test_a_damaged_survey_is_named(store: SurveyStore, tmp_path: Path, kept: int) -> None:
    store.keep(CARD, {"active_feature": active((0, 1), (0, 1))}, tmp_path)
    (path,) = (tmp_path / "registry" / "features").iterdir()
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(StorageError) as raised:
        store.of(SAE, "s").together(0)
    assert raised.value.code == "damaged_survey"


def test_a_checkpoint_that_was_cut_off_is_none(store: SurveyStore, tmp_path: Path) -> None:
    store.keep_checkpoint("k", {"a": np.arange(5)}, tmp_path)
    assert store.checkpoint("k")["a"].tolist() == [0, 1, 2, 3, 4]
    (path,) = (tmp_path / "registry" / "features").iterdir()
    path.write_bytes(path.read_bytes()[:-1])
    assert store.checkpoint("k") is None
    store.drop_checkpoint("k")
    assert store.checkpoint("k") is None


def test_garbage_collection_takes_what_has_no_sae(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        registry.surveys.keep(CARD, {"active_feature": active((0,))}, tmp_path)
        registry.collect_garbage(dry_run=True)
        assert registry.surveys.find(SAE) is not None
        registry.collect_garbage()
        assert registry.surveys.find(SAE) is None


def test_a_read_only_place_is_read_and_keeps_nothing(store: SurveyStore, tmp_path: Path) -> None:
    store.keep(CARD, {"active_feature": active((0,))}, tmp_path)
    closed = SurveyStore(str(tmp_path / "registry"), read_only="it lies on a disk for reading")
    assert closed.of(SAE, "s").card == CARD
    with pytest.raises(StorageError, match="for reading") as raised:
        closed.keep(CARD, {"active_feature": active((0,))}, tmp_path)
    assert raised.value.code == "read_only"
