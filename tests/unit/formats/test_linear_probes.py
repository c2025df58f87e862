"""Linear probes of torch and scikit-learn, read as detectors, score as they do themselves."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
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
            nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 1)).state_dict(),
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


def test_a_dictionary_of_arrays_in_a_pickle(tmp_path: Path) -> None:
    held = {"coef": np.ones((1, WIDTH)), "intercept": np.array([0.5]), "layer": 2}
    (tmp_path / "probe.pkl").write_bytes(pickle.dumps(held))
    found = convert_pickle(tmp_path / "probe.pkl", ImportOptions(site="resid_mid"))
    assert isinstance(found, Detector)
    assert (found.point, found.bias) == (HookPoint(2, "resid_mid"), 0.5)


class Probe(nn.Module):
    """As people write them; in the file is its name alone."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 1)
        self.dropout = nn.Dropout()

    def forward(self, states: Tensor) -> Tensor:
        return torch.sigmoid(self.linear(self.dropout(states)))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", STATES.mean(0))
        self.register_buffer("std", STATES.std(0))
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, states: Tensor) -> Tensor:
        return self.head((states - self.mean) / self.std)


MODULES: dict[str, tuple[nn.Module, Callable[[nn.Module, Tensor], Tensor]]] = {
    "a layer": (nn.Linear(WIDTH, 1), lambda m, x: m(x)[:, 0]),
    "without a bias": (nn.Linear(WIDTH, 1, bias=False), lambda m, x: m(x)[:, 0]),
    "two classes": (nn.Linear(WIDTH, 2), lambda m, x: m(x)[:, 1] - m(x)[:, 0]),
    "a sequence": (nn.Sequential(nn.Linear(WIDTH, 1), nn.Sigmoid()), lambda m, x: m(x)[:, 0]),
    "their own": (Probe(), lambda m, x: m(x)[:, 0]),
    "with buffers": (Centred(), lambda m, x: m(x)[:, 0]),
}


@pytest.mark.parametrize("what", MODULES)
@pytest.mark.parametrize("how", ["torch", "pickle", "joblib", "beside others"])
def test_a_whole_module_of_torch_is_converted(tmp_path: Path, what: str, how: str) -> None:
    module, score = MODULES[what]
    path = tmp_path / "probe.pt"
    if how == "pickle":
        path.write_bytes(pickle.dumps(module))
    elif how == "joblib":
        joblib.dump(module, path)
    else:
        torch.save({"probe": module, "accuracy": 0.9} if how == "beside others" else module, path)
    found = convert_pickle(path, HERE)
    assert isinstance(found, Detector)
    wanted = score(module.eval(), STATES).detach()
    if what in ("a sequence", "their own"):
        assert torch.equal(found.scores(STATES) > 0, wanted > 0.5)
    else:
        torch.testing.assert_close(found.scores(STATES), wanted, rtol=1e-4, atol=1e-4)
    with pytest.raises(SteerError) as raised:
        read(path)
    assert "steer vectors convert" in raised.value.message or how in ("pickle", "joblib")


@pytest.mark.parametrize(
    ("module", "says"),
    [
        (nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU(), nn.Linear(4, 1)), "2 layers of weights"),
        (nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 1)), "2 layers of weights"),
        (nn.Linear(WIDTH, 3), "of more classes"),
    ],
    ids=["a network", "behind a norm", "three classes"],
)
def test_a_module_that_is_no_linear_probe(tmp_path: Path, module: nn.Module, says: str) -> None:
    torch.save(module, tmp_path / "probe.pt")
    with pytest.raises(SteerError, match=says):
        convert_pickle(tmp_path / "probe.pt", HERE)


@pytest.mark.parametrize("writer", WRITERS)
@pytest.mark.parametrize("prefix", ["", "layers.", "layer_"])
def test_of_a_probe_for_each_layer_the_stated_one(tmp_path: Path, writer: str, prefix: str) -> None:
    held = {
        f"{prefix}{layer}.{name}": one + layer for layer in (3, 12) for name, one in ONE.items()
    }
    WRITERS[writer](tmp_path / "probe", held)
    options = ImportOptions(layers=(12,), site="resid_post")
    found = read(tmp_path / "probe", options)
    assert (found.point.layer, found.bias) == (12, 12.0)
    for layers in ((5,), (3, 12), None):
        with pytest.raises(SteerError, match=r"for the layers \[3, 12\]") as raised:
            read(tmp_path / "probe", ImportOptions(layers=layers, site="resid_post"))
        assert raised.value.code == "layer_required"


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("key", [str, int])
def test_of_a_dictionary_of_probes_by_layer(tmp_path: Path, key: type, wrapped: bool) -> None:
    held = {key(layer): {name: one + layer for name, one in ONE.items()} for layer in (3, 12)}
    torch.save({"probes": held} if wrapped else held, tmp_path / "probe.pt")
    found = read(tmp_path / "probe.pt", ImportOptions(layers=(3,), site="resid_post"))
    assert (found.point.layer, found.bias) == (3, 3.0)
    torch.save({key(7): ONE}, tmp_path / "probe.pt")
    assert read(tmp_path / "probe.pt", ImportOptions(site="resid_post")).point.layer == 7
