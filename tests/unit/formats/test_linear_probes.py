"""Linear probes of torch and scikit-learn, read as detectors, score as they do themselves."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.base import clone
from sklearn.decomposition import PCA
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, RidgeClassifier
from sklearn.neural_network import MLPClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from steer.artefacts.detector import Detector
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.vectors.pickles import convert_pickle
from steer.model import HookPoint
from steer.spec import Where

WIDTH = 12
GENERATOR = torch.Generator().manual_seed(0)
STATES = 3 + 5 * torch.randn(40, WIDTH, generator=GENERATOR)
LABELS = (STATES[:, 0] + STATES[:, 1] > 6).int()
HERE = ImportOptions(layers=(3,), site="resid_post")

Held = Mapping[str, Tensor]
Writer = Callable[[Path, Held], None]


def as_npz(path: Path, held: Held) -> None:
    with path.open("wb") as stream:
        np.savez(stream, **{name: one.numpy() for name, one in held.items()})


def as_json(path: Path, held: Held) -> None:
    path.write_text(json.dumps({name: one.tolist() for name, one in held.items()}))


WRITERS: dict[str, Writer] = {
    "safetensors": lambda path, held: save_file({k: v.contiguous() for k, v in held.items()}, path),
    "pt": lambda path, held: torch.save(dict(held), path),
    "pt, wrapped": lambda path, held: torch.save({"state_dict": dict(held), "epoch": 3}, path),
    "npz": as_npz,
    "json": as_json,
}


def read(path: Path, options: ImportOptions = HERE) -> Detector:
    found = read_artefact(path, options, scratch=None, unpacked_limit=1 << 20)
    assert isinstance(found, Detector)
    return found


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("prefix", ["", "linear.", "probe.net.0."])
@pytest.mark.parametrize("classes", [1, 2])
def test_a_layer_of_torch(tmp_path: Path, writer: str, prefix: str, classes: int) -> None:
    torch.manual_seed(classes)
    layer = nn.Linear(WIDTH, classes)
    held = {f"{prefix}{name}": one.detach() for name, one in layer.state_dict().items()}
    WRITERS[writer](tmp_path / "probe", held)
    found = read(tmp_path / "probe")
    logits = layer(STATES)
    wanted = logits[:, 0] if classes == 1 else logits[:, 1] - logits[:, 0]
    torch.testing.assert_close(found.scores(STATES), wanted.detach(), rtol=1e-5, atol=1e-5)
    assert (found.point, found.threshold) == (HookPoint(3, "resid_post"), 0.0)


@pytest.mark.parametrize("writer", WRITERS)
def test_a_regression_behind_a_scaler(tmp_path: Path, writer: str) -> None:
    fitted = make_pipeline(StandardScaler(), LogisticRegression())
    fitted.fit(STATES.numpy(), LABELS.numpy())
    scaler, regression = (step for _, step in fitted.steps)
    held = {
        "coef_": torch.from_numpy(regression.coef_),
        "intercept_": torch.from_numpy(regression.intercept_),
        "mean_": torch.from_numpy(scaler.mean_),
        "scale_": torch.from_numpy(scaler.scale_),
    }
    WRITERS[writer](tmp_path / "probe", held)
    scores = read(tmp_path / "probe").scores(STATES)
    wanted = torch.from_numpy(fitted.decision_function(STATES.numpy()))
    torch.testing.assert_close(scores.double(), wanted.double(), rtol=1e-4, atol=1e-4)
    assert torch.equal(scores > 0, torch.from_numpy(fitted.predict(STATES.numpy())) == 1)


def test_what_the_file_says_of_its_place(tmp_path: Path) -> None:
    about = {"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1), "layer": 4, "site": "mlp_out"}
    torch.save(about, tmp_path / "probe.pt")
    assert read(tmp_path / "probe.pt", ImportOptions()).point == HookPoint(4, "mlp_out")
    blocks = ImportOptions(layers=(2,), source="blocks", site=None)
    torch.save({"w": torch.ones(WIDTH), "b": 0.5}, tmp_path / "plain.pt")
    found = read(tmp_path / "plain.pt", blocks)
    assert (found.point, found.bias) == (HookPoint(2, "resid_post"), 0.5)


ONE = {"weight": torch.ones(1, WIDTH), "bias": torch.zeros(1)}


@pytest.mark.parametrize(
    ("held", "options", "code", "says"),
    [
        (ONE, ImportOptions(), "layer_required", "0-based block"),
        (ONE, ImportOptions(layers=(1, 2)), "layer_required", "one 0-based block"),
        (ONE, ImportOptions(layers=(1,)), "site_required", "'site'"),
        (ONE, ImportOptions(layers=(1,), source="hidden-states"), "invalid_option", "k - 1"),
        (
            ONE,
            ImportOptions(layers=(1,), site="mlp_out", strength=2.0),
            "invalid_option",
            "strength",
        ),
        (ONE | {"threshold": 0.7}, HERE, "unhonoured_metadata", "sigmoid"),
        (ONE | {"normalize": True}, HERE, "unhonoured_metadata", "normalised"),
        (
            {"weight": torch.ones(3, WIDTH), "bias": torch.zeros(3)},
            HERE,
            "unknown_layout",
            "of more classes",
        ),
        (
            {f"{n}.{k}": v for n in (0, 2) for k, v in ONE.items()},
            HERE,
            "unknown_layout",
            "2 layers of weights",
        ),
        (ONE | {"mean": torch.ones(5)}, HERE, "mixed_widths", "scaler's mean"),
        (ONE | {"scale": torch.zeros(WIDTH)}, HERE, "not_finite", "NaN or Inf"),
        (ONE | {"bias": torch.tensor([1])}, HERE, "invalid_file", "int64"),
    ],
)
def test_what_is_not_clear_is_asked_or_refused(
    tmp_path: Path, held: dict[str, Any], options: ImportOptions, code: str, says: str
) -> None:
    torch.save(held, tmp_path / "probe.pt")
    with pytest.raises(SteerError) as found:
        read(tmp_path / "probe.pt", options)
    assert says in found.value.message
    assert found.value.code == code


def test_a_direction_alone_is_a_vector_as_before(tmp_path: Path) -> None:
    torch.save({"weight": torch.ones(1, WIDTH)}, tmp_path / "row.pt")
    options = ImportOptions(layers=(1,), source="blocks", where=Where(phases=("prompt",)))
    found = read_artefact(tmp_path / "row.pt", options, scratch=None, unpacked_limit=1 << 20)
    assert found.card.kind == "vector"


def test_weights_of_a_model_are_no_probe(tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj"
    torch.save({f"{name}.weight": torch.ones(2, 4), f"{name}.bias": torch.ones(2)}, tmp_path / "w")
    with pytest.raises(SteerError) as found:
        read(tmp_path / "w")
    assert found.value.code == "model_weights"


@pytest.mark.parametrize(
    "estimator",
    [
        LogisticRegression(),
        LogisticRegression(fit_intercept=False),
        LinearSVC(),
        LinearDiscriminantAnalysis(),
        RidgeClassifier(),
        make_pipeline(StandardScaler(), LogisticRegression()),
        make_pipeline(StandardScaler(with_mean=False), LogisticRegression()),
        make_pipeline(StandardScaler(with_std=False), LinearSVC()),
        make_pipeline("passthrough", LogisticRegression()),
    ],
    ids=str,
)
@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_what_scikit_learn_pickles_is_converted(
    tmp_path: Path, estimator: Any, protocol: int
) -> None:
    fitted = clone(estimator).fit(STATES.numpy(), LABELS.numpy())
    (tmp_path / "probe.pkl").write_bytes(pickle.dumps(fitted, protocol=protocol))
    found = convert_pickle(tmp_path / "probe.pkl", HERE)
    assert isinstance(found, Detector)
    wanted = torch.from_numpy(fitted.decision_function(STATES.numpy())).double()
    torch.testing.assert_close(found.scores(STATES).double(), wanted, rtol=1e-4, atol=1e-3)
    (tmp_path / "probe.safetensors").write_bytes(found.to_bytes())
    assert read(tmp_path / "probe.safetensors", ImportOptions()).sha256 == found.sha256


def test_a_dictionary_of_arrays_in_a_pickle(tmp_path: Path) -> None:
    held = {"coef": np.ones((1, WIDTH)), "intercept": np.array([0.5]), "layer": 2}
    (tmp_path / "probe.pkl").write_bytes(pickle.dumps(held))
    found = convert_pickle(tmp_path / "probe.pkl", ImportOptions(site="resid_mid"))
    assert isinstance(found, Detector)
    assert (found.point, found.bias) == (HookPoint(2, "resid_mid"), 0.5)


@pytest.mark.parametrize(
    ("estimator", "says"),
    [
        (make_pipeline(StandardScaler(), StandardScaler(), LogisticRegression()), "one Standard"),
        (make_pipeline(StandardScaler(), StandardScaler()), "linear classifier"),
        (make_pipeline(PCA(3), LogisticRegression()), "PCA"),
        (MLPClassifier((4,), max_iter=5), "MLPClassifier"),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore::sklearn.exceptions.ConvergenceWarning")
def test_what_is_not_linear_is_refused_by_name(tmp_path: Path, estimator: Any, says: str) -> None:
    try:
        fitted = clone(estimator).fit(STATES.numpy(), LABELS.numpy())
    except TypeError:
        fitted = estimator
    (tmp_path / "probe.pkl").write_bytes(pickle.dumps(fitted))
    with pytest.raises(SteerError, match=says):
        convert_pickle(tmp_path / "probe.pkl", HERE)


def test_what_was_not_fitted_is_refused(tmp_path: Path) -> None:
    (tmp_path / "probe.pkl").write_bytes(pickle.dumps(LogisticRegression()))
    with pytest.raises(SteerError, match="fit it first"):
        convert_pickle(tmp_path / "probe.pkl", HERE)
