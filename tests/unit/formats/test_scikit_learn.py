"""Classifiers of scikit-learn, in pickles and joblib files, score as they do themselves."""

from __future__ import annotations

import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.calibration import CalibratedClassifierCV
from sklearn.decomposition import PCA, TruncatedSVD
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import (
    LinearRegression,
    LogisticRegression,
    LogisticRegressionCV,
    Perceptron,
    Ridge,
    RidgeClassifier,
    RidgeClassifierCV,
    SGDClassifier,
)
from sklearn.model_selection import GridSearchCV
from sklearn.naive_bayes import GaussianNB
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import (
    MaxAbsScaler,
    MinMaxScaler,
    Normalizer,
    RobustScaler,
    StandardScaler,
)
from sklearn.svm import SVC, LinearSVC, NuSVC

from steer.artefacts.detector import Detector
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.vectors.pickles import convert_pickle

WIDTH = 12
STATES = np.random.default_rng(0).normal(3, 5, (60, WIDTH)).astype(np.float32)
TRUE = STATES[:, 0] + STATES[:, 1] > 6
LABELS = {
    "numbers": TRUE.astype(int),
    "true and false": TRUE,
    "texts": np.where(TRUE, "honest", "deceptive"),
    "objects": np.where(TRUE, "honest", "deceptive").astype(object),
    "fractions": TRUE.astype(float),
}
HERE = ImportOptions(layers=(3,), site="resid_post")

ESTIMATORS = [
    LogisticRegression(),
    LogisticRegression(fit_intercept=False),
    LogisticRegression(class_weight="balanced", random_state=np.random.RandomState(0)),
    LogisticRegressionCV(cv=3),
    LinearSVC(),
    SVC(kernel="linear"),
    NuSVC(kernel="linear"),
    LinearDiscriminantAnalysis(),
    RidgeClassifier(),
    RidgeClassifierCV(),
    SGDClassifier(),
    SGDClassifier(loss="log_loss"),
    Perceptron(),
    make_pipeline(StandardScaler(), LogisticRegression()),
    make_pipeline(StandardScaler(with_mean=False), LogisticRegression()),
    make_pipeline(StandardScaler(with_std=False), LinearSVC()),
    make_pipeline("passthrough", LogisticRegression()),
    make_pipeline(MinMaxScaler((-1, 2)), LogisticRegression()),
    make_pipeline(MaxAbsScaler(), LogisticRegression()),
    make_pipeline(RobustScaler(), LogisticRegression()),
    make_pipeline(StandardScaler(), PCA(4), LogisticRegression()),
    make_pipeline(PCA(4, whiten=True), StandardScaler(), LinearSVC()),
    make_pipeline(TruncatedSVD(4), LogisticRegression()),
    make_pipeline(make_pipeline(StandardScaler(), PCA(5)), LogisticRegression()),
    GridSearchCV(LogisticRegression(), {"C": [0.1, 1]}, cv=3),
    GridSearchCV(make_pipeline(StandardScaler(), LinearSVC()), {"linearsvc__C": [0.1, 1]}, cv=3),
    make_pipeline(StandardScaler(), GridSearchCV(LogisticRegression(), {"C": [0.1, 1]}, cv=3)),
]


def kinds(estimator: Any) -> str:
    """Its name; a seed's own would be its address."""
    return re.sub(r" at 0x[0-9A-Fa-f]+", "", str(estimator))


def compressed(fitted: Any, path: Path) -> None:
    joblib.dump(fitted, path, compress=3)


WRITERS: dict[str, Callable[[Any, Path], object]] = {
    "pickle 2": lambda fitted, path: path.write_bytes(pickle.dumps(fitted, protocol=2)),
    "pickle 5": lambda fitted, path: path.write_bytes(pickle.dumps(fitted, protocol=5)),
    "joblib": joblib.dump,
    "joblib, compressed": compressed,
    "torch": lambda fitted, path: torch.save({"clf": fitted, "accuracy": 0.9}, path),
}


def converted(path: Path, options: ImportOptions = HERE) -> Detector:
    found = convert_pickle(path, options)
    assert isinstance(found, Detector)
    return found


def scores_alike(found: Detector, fitted: Any, states: np.ndarray = STATES) -> None:
    wanted = torch.from_numpy(np.asarray(fitted.decision_function(states))).double()
    scores = found.scores(torch.from_numpy(states)).double()
    torch.testing.assert_close(scores, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))


@pytest.mark.parametrize("estimator", ESTIMATORS, ids=kinds)
@pytest.mark.parametrize("writer", WRITERS)
def test_what_scikit_learn_fitted_is_converted(tmp_path: Path, estimator: Any, writer: str) -> None:
    for labels in ("numbers", "texts"):
        fitted = clone(estimator).fit(STATES, LABELS[labels])
        WRITERS[writer](fitted, tmp_path / "probe")
        scores_alike(converted(tmp_path / "probe"), fitted)


@pytest.mark.parametrize("labels", LABELS)
@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize(
    "estimator", [LogisticRegression(), LogisticRegressionCV(cv=3), RidgeClassifier()], ids=str
)
def test_labels_are_of_every_type_and_texts_are_kept(
    tmp_path: Path, estimator: Any, writer: str, labels: str
) -> None:
    fitted = clone(estimator).fit(STATES, LABELS[labels])
    WRITERS[writer](fitted, tmp_path / "probe")
    found = converted(tmp_path / "probe")
    scores_alike(found, fitted)
    told = found.card.detection
    assert told is not None
    assert told.detects == ("honest, not deceptive" if labels in ("texts", "objects") else "")


def scaled() -> tuple[Any, Any, Any]:
    scaler = StandardScaler().fit(STATES)
    classifier = LogisticRegression().fit(scaler.transform(STATES), LABELS["numbers"])
    return scaler, classifier, make_pipeline(scaler, classifier)


@pytest.mark.parametrize("writer", [name for name in WRITERS if name != "torch"])
def test_a_scaler_beside_its_classifier(tmp_path: Path, writer: str) -> None:
    scaler, classifier, both = scaled()
    for held in (
        {"scaler": scaler, "clf": classifier, "layer": 4},
        {"model": classifier, "scaler": scaler, "layer": 4, "site": "resid_post"},
    ):
        WRITERS[writer](held, tmp_path / "probe")
        found = converted(tmp_path / "probe", ImportOptions(site="resid_post"))
        scores_alike(found, both)
        assert found.point.layer == 4
    WRITERS[writer]((scaler, classifier), tmp_path / "probe")
    scores_alike(converted(tmp_path / "probe"), both)


@pytest.mark.parametrize("held", [{3: 0, 12: 1}, {"layer_3": 0, "layer_12": 1}], ids=str)
@pytest.mark.parametrize("wrapped", [False, True])
def test_of_classifiers_by_layer_the_stated_one(
    tmp_path: Path, held: dict[Any, int], wrapped: bool
) -> None:
    fitted = [LogisticRegression().fit(STATES + k, LABELS["numbers"]) for k in range(2)]
    by_layer = {key: fitted[k] for key, k in held.items()}
    joblib.dump({"probes": by_layer, "seed": 0} if wrapped else by_layer, tmp_path / "probe")
    options = ImportOptions(layers=(12,), site="resid_post")
    scores_alike(converted(tmp_path / "probe", options), fitted[1])
    with pytest.raises(SteerError, match=r"for the layers \[3, 12\]") as raised:
        converted(tmp_path / "probe", ImportOptions(site="resid_post"))
    assert raised.value.code == "layer_required"
    joblib.dump({12: fitted[0]}, tmp_path / "probe")
    assert converted(tmp_path / "probe", ImportOptions(site="resid_post")).point.layer == 12


REFUSED: list[tuple[Any, str]] = [
    (make_pipeline(Normalizer(), LogisticRegression()), "Normalizer"),
    (make_pipeline(MinMaxScaler(clip=True), LogisticRegression()), "clips"),
    (MLPClassifier((4,), max_iter=5), "MLPClassifier"),
    (GaussianNB(), "GaussianNB"),
    (CalibratedClassifierCV(LinearSVC(), cv=3), "CalibratedClassifierCV"),
    (SVC(), "kernel 'rbf'"),
    (LinearRegression(), "predicts a number"),
    (make_pipeline(StandardScaler(), Ridge()), "predicts a number"),
]


@pytest.mark.parametrize(("estimator", "says"), REFUSED, ids=[str(one) for one, _ in REFUSED])
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_is_no_linear_classifier_is_refused_by_name(
    tmp_path: Path, estimator: Any, says: str
) -> None:
    joblib.dump(clone(estimator).fit(STATES, LABELS["numbers"]), tmp_path / "probe")
    with pytest.raises(SteerError, match=says) as raised:
        converted(tmp_path / "probe")
    assert raised.value.code == "unknown_layout"


@pytest.mark.parametrize(
    ("held", "says"),
    [
        (StandardScaler().fit(STATES), "linear classifier"),
        (make_pipeline(StandardScaler(), StandardScaler()).fit(STATES), "linear classifier"),
        ([LogisticRegression().fit(STATES, TRUE)] * 2, "which of them"),
        ((StandardScaler(), PCA(), LogisticRegression()), "in which order"),
        ({"clf": GaussianNB().fit(STATES, TRUE)}, "GaussianNB: read is a linear classifier"),
        (LogisticRegression(), "fit it first"),
        (LogisticRegression().fit(STATES, np.arange(60) % 3), "of more classes"),
        (SVC(kernel="linear").fit(STATES, np.arange(60) % 3), "of more classes"),
        ({"scaler": PCA(4).fit(STATES), "clf": LogisticRegression().fit(STATES, TRUE)}, "shape"),
        ({"clf": LogisticRegression().fit(STATES, TRUE), "normalize": True}, "normalize"),
    ],
)
def test_what_is_not_clear_is_refused(tmp_path: Path, held: Any, says: str) -> None:
    joblib.dump(held, tmp_path / "probe")
    with pytest.raises(SteerError, match=says):
        converted(tmp_path / "probe")


class Harmful:
    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.folder),)


@pytest.mark.parametrize("writer", WRITERS)
def test_nothing_in_the_file_is_ever_called(tmp_path: Path, writer: str) -> None:
    fitted = LogisticRegression().fit(STATES, LABELS["texts"])
    fitted.harm = Harmful(tmp_path / "was here")
    WRITERS[writer](fitted, tmp_path / "probe")
    scores_alike(converted(tmp_path / "probe"), fitted)
    assert not (tmp_path / "was here").exists()


def test_an_upload_of_one_says_to_convert_it(tmp_path: Path) -> None:
    fitted = LogisticRegression().fit(STATES, LABELS["texts"])
    for write in (joblib.dump, lambda one, path: path.write_bytes(pickle.dumps(one)), torch.save):
        write(fitted, tmp_path / "probe")
        with pytest.raises(SteerError, match="steer vectors convert") as raised:
            read_artefact(tmp_path / "probe", HERE, scratch=None, unpacked_limit=0)
        assert raised.value.code == "pickle_refused"
