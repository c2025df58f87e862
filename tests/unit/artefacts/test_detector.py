"""Detectors: probes and features of SAEs as one row, pooled in the order of the tokens."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import random_detector, random_sae
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file

from steer.artefacts.detection import Detection
from steer.artefacts.detector import Detector, ScoreWindow
from steer.errors import FileFormatError, SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.registry.registry import Registry

ROW = torch.arange(1.0, 5.0)


def read(path: Path) -> Any:
    return read_artefact(path, ImportOptions(), scratch=None, unpacked_limit=0)


def test_scores_are_logits_of_the_probe() -> None:
    detector = Detector.of(ROW, layer=2, bias=-0.25, threshold=1.5)
    states = torch.randn(7, 4, generator=torch.Generator().manual_seed(1))
    expected = states.double() @ ROW.double() - 0.25
    torch.testing.assert_close(detector.scores(states).double(), expected, rtol=1e-6, atol=1e-6)
    assert (detector.point.layer, detector.point.site) == (2, "resid_post")
    assert (detector.threshold, detector.detection.last) == (1.5, 1)


def test_a_detector_comes_back_from_its_file(tmp_path: Path) -> None:
    detection = Detection(detects="rudeness", pooling="mean", last=3, rate=0.05)
    made = Detector.of(
        ROW, layer=1, bias=0.1, threshold=0.3, detection=detection, site="mlp_out", model="m"
    )
    file = tmp_path / "one"
    file.write_bytes(made.to_bytes())
    back = read(file)
    assert back.to_bytes() == made.to_bytes()
    assert (back.card, back.bias, back.threshold) == (made.card, made.bias, made.threshold)
    with Registry.open(tmp_path / "registry") as registry:
        registry.add("rude", made)
        assert registry.detector("rude").card.detection == detection


@pytest.mark.parametrize(
    ("make", "code"),
    [
        (lambda: Detector.of(torch.zeros(4), layer=0), "zero_vector"),
        (lambda: Detector.of(ROW / 0, layer=0), "not_finite"),
        (lambda: Detector.of(ROW, layer=0, bias=math.nan), "not_finite"),
        (lambda: Detector.of(ROW, layer=0, threshold=1e39), "not_finite"),
        (lambda: Detector.of(torch.ones(2, 2), layer=0), "invalid_file"),
    ],
)
def test_what_is_no_detector(make: Callable[[], Detector], code: str) -> None:
    with pytest.raises(FileFormatError) as raised:
        make()
    assert raised.value.code == code


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (lambda tensors, card: (tensors | {"layers.3.bias": torch.ones(1)}, card), "invalid_file"),
        (lambda tensors, card: (tensors | {"layers.1.bias": torch.ones(2)}, card), "invalid_file"),
        (
            lambda tensors, card: (tensors, card.model_copy(update={"detection": None})),
            "invalid_card",
        ),
        (lambda tensors, card: (tensors, card.model_copy(update={"layers": (2,)})), "invalid_card"),
    ],
    ids=["another layer", "two biases", "no pooling", "other layers"],
)
def test_files_that_lie_are_refused(tmp_path: Path, change: Any, code: str) -> None:
    made = random_detector(1, 1, width=4)
    tensors = {
        "layers.1.direction": made.direction,
        "layers.1.bias": torch.tensor([made.bias]),
        "layers.1.threshold": torch.tensor([made.threshold]),
    }
    tensors, card = change(tensors, made.card)
    text = card.model_dump_json(by_alias=True, exclude={"name"})
    save_file(tensors, tmp_path / "file", {"steer": text})
    with pytest.raises(SteerError) as raised:
        read(tmp_path / "file")
    assert raised.value.code == code


@pytest.mark.parametrize("architecture", ["standard", "jumprelu"])
def test_a_feature_fires_where_the_sae_is_active(architecture: str) -> None:
    sae = random_sae(architecture, seed=4, layer=2)
    states = torch.randn(400, sae.d_in, generator=torch.Generator().manual_seed(2))
    active = sae.encode(states)
    for feature in (0, 7, 31):
        detector = Detector.of_feature(sae, feature, detects="something")
        scores = detector.scores(states)
        fires = scores > detector.threshold
        clear = (scores - detector.threshold).abs() > 1e-5
        assert torch.equal(fires[clear], (active[:, feature] > 0)[clear])
        on = active[:, feature] > 0
        torch.testing.assert_close(scores[on], active[on, feature], rtol=1e-4, atol=1e-5)
        assert on.any()
        assert not on.all()
        assert detector.card.provenance == {"sae_sha256": sae.sha256, "feature": feature}
        assert detector.detection.source == "feature"


@pytest.mark.parametrize(
    ("architecture", "code", "named"),
    [
        ("topk", "unsupported_architecture", "topk"),
        ("abstopk", "unsupported_architecture", "abstopk"),
        ("matching_pursuit", "unsupported_architecture", "matching_pursuit"),
        ("standard-centred", "per_token_normalisation", "layer_norm"),
    ],
)
def test_features_that_compete_are_refused_by_name(
    architecture: str, code: str, named: str
) -> None:
    with pytest.raises(SteerError) as raised:
        Detector.of_feature(random_sae(architecture, seed=4), 0)
    assert raised.value.code == code
    assert named in raised.value.message


def test_a_threshold_below_the_features_own_is_refused() -> None:
    sae = random_sae("jumprelu", seed=4)
    with pytest.raises(FileFormatError, match="feature's own"):
        Detector.of_feature(sae, 0, threshold=-1.0)
    assert Detector.of_feature(sae, 0, threshold=9.0).threshold == 9.0


@given(
    scores=st.lists(st.floats(-1e6, 1e6, width=32), max_size=20),
    last=st.integers(1, 6),
    pooling=st.sampled_from(["max", "mean"]),
)
def test_windows_pool_the_last_scores(scores: list[float], last: int, pooling: Any) -> None:
    window = ScoreWindow(pooling, last)
    for end, score in enumerate(scores, start=1):
        seen = scores[max(0, end - last) : end]
        expected = max(seen) if pooling == "max" else math.fsum(seen) / len(seen)
        assert window.push(score) == expected


def test_a_score_that_is_no_number_spoils_its_window_alone() -> None:
    window = ScoreWindow("mean", 2)
    assert window.push(1.0) == 1.0
    assert math.isnan(window.push(math.nan))
    assert math.isnan(window.push(1.0))
    assert window.push(3.0) == 2.0
    assert ScoreWindow("mean", 2).push(math.inf) == math.inf
