"""The offline converter: what steering-vectors pickles, and pickles that want more.

The package is not installed here: a class of the same name writes the same pickles. The oracle
tests convert files of the package itself.
"""

import os
import pickle
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash
from steer.formats.vectors.steering_vectors_pickle import read_steering_vector

MODULE = "steering_vectors.steering_vector"


@pytest.fixture(autouse=True)
def steering_vector(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """The dataclass, importable where its pickles say."""

    @dataclass
    class SteeringVector:
        layer_activations: dict[int, Any]
        layer_type: str = "decoder_block"

    SteeringVector.__module__, SteeringVector.__qualname__ = MODULE, "SteeringVector"
    module = types.ModuleType(MODULE)
    module.SteeringVector = SteeringVector  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "steering_vectors", types.ModuleType("steering_vectors"))
    monkeypatch.setitem(sys.modules, MODULE, module)
    return SteeringVector


def rows(dtype: torch.dtype = torch.float32) -> dict[int, torch.Tensor]:
    whole = torch.arange(1, 13, dtype=dtype).reshape(3, 4)
    return {0: whole[1, :3], 7: whole.T[2]}


def written(path: Path, value: Any, how: str) -> Path:
    if how == "torch":
        torch.save(value, path)
    else:
        path.write_bytes(pickle.dumps(value, protocol=int(how)))
    return path


HOW = ["torch", "2", "3", "4", "5"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_equal(
    tmp_path: Path, steering_vector: Callable[..., Any], how: str, dtype: torch.dtype
) -> None:
    path = written(tmp_path / "v", steering_vector(rows(dtype)), how)
    vector = read_steering_vector(path)
    assert {n: row.tolist() for n, row in vector.directions.items()} == {
        n: row.tolist() for n, row in rows(dtype).items()
    }
    assert vector.card.provenance == {
        "format": "pickle",
        "tool": "steering-vectors",
        "layer_offset": 0,
        "layer_names": {"0": "0", "7": "7"},
        "file_sha256": file_hash(path),
    }


@pytest.mark.parametrize(
    ("layer_type", "site"),
    [("decoder_block", "resid_post"), ("self_attn", "attn_out"), ("mlp", "mlp_out")],
)
def test_layer_types_are_sites(
    tmp_path: Path, steering_vector: Callable[..., Any], layer_type: str, site: str
) -> None:
    path = written(tmp_path / "v", steering_vector(rows(), layer_type), "4")
    assert read_steering_vector(path).card.site == site


@pytest.mark.parametrize("layer_type", ["input_layernorm", "post_attention_layernorm"])
def test_norms_are_refused_by_name(
    tmp_path: Path, steering_vector: Callable[..., Any], layer_type: str
) -> None:
    path = written(tmp_path / "v", steering_vector(rows(), layer_type), "torch")
    with pytest.raises(SteerError, match=layer_type) as raised:
        read_steering_vector(path)
    assert raised.value.code == "unsupported_site"
    assert "decoder_block" in raised.value.message


@pytest.mark.parametrize("how", HOW)
def test_the_server_goes_on_refusing_them(
    tmp_path: Path, steering_vector: Callable[..., Any], how: str
) -> None:
    path = written(tmp_path / "v", steering_vector(rows()), how)
    with pytest.raises(SteerError) as raised:
        read_artefact(path, ImportOptions(), scratch=tmp_path / "s", unpacked_limit=1 << 20)
    assert raised.value.code == "pickle_refused"
    assert "steer vectors convert" in raised.value.message or "SteeringVector" in str(raised.value)


class Harmful:
    def __init__(self, folder: Path, function: Any = os.mkdir) -> None:
        self._call = function, (str(folder),)

    def __reduce__(self) -> Any:
        return self._call


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("place", ["instead", "as a row", "as the type", "beside"])
def test_anything_else_is_refused_by_name_and_never_called(
    tmp_path: Path, steering_vector: Callable[..., Any], how: str, place: str
) -> None:
    trace = tmp_path / "was here"
    harm = Harmful(trace)
    value = {
        "instead": harm,
        "as a row": steering_vector({0: harm}),
        "as the type": steering_vector(rows(), harm),
        "beside": [harm, steering_vector(rows())],
    }[place]
    path = written(tmp_path / "v", value, how)
    with pytest.raises(SteerError, match=r"(posix|nt)\.mkdir") as raised:
        read_steering_vector(path)
    assert raised.value.code == "pickle_refused"
    assert not trace.exists()


def test_other_classes_of_the_package_are_refused(
    tmp_path: Path, steering_vector: Callable[..., Any]
) -> None:
    other = type("Other", (), {"__module__": MODULE})
    sys.modules[MODULE].Other = other  # type: ignore[attr-defined]
    with pytest.raises(SteerError, match=r"steering_vector\.Other"):
        read_steering_vector(written(tmp_path / "v", other(), "4"))


def test_a_storage_that_lies_about_its_length(
    tmp_path: Path, steering_vector: Callable[..., Any]
) -> None:
    data = pickle.dumps(steering_vector({0: torch.ones(5)}), protocol=4)
    inner = (5).to_bytes(8, "little") + b"\0\0\x80\x3f" * 5
    assert data.count(inner) == 1
    (tmp_path / "v").write_bytes(data.replace(inner, (6).to_bytes(8, "little") + inner[8:]))
    with pytest.raises(SteerError) as raised:
        read_steering_vector(tmp_path / "v")
    assert raised.value.code == "truncated_file"


@pytest.mark.parametrize(
    "value", [{"0": torch.ones(3)}, torch.ones(3), 5, {"layer_activations": {}}]
)
def test_tensors_alone_are_not_converted(tmp_path: Path, value: Any) -> None:
    with pytest.raises(SteerError) as raised:
        read_steering_vector(written(tmp_path / "v", value, "torch"))
    assert raised.value.code == "unknown_layout"


def test_state_that_is_no_vector(tmp_path: Path, steering_vector: Callable[..., Any]) -> None:
    for made in (
        steering_vector({}),
        steering_vector({"0": torch.ones(3)}),
        steering_vector({-1: torch.ones(3)}),
        steering_vector([torch.ones(3)]),
        steering_vector(rows(), "head"),
        steering_vector({0: torch.full((3,), torch.inf)}),
    ):
        with pytest.raises(SteerError) as raised:
            read_steering_vector(written(tmp_path / "v", made, "4"))
        assert 400 <= raised.value.status < 500


def test_every_truncation_is_refused(tmp_path: Path, steering_vector: Callable[..., Any]) -> None:
    path = tmp_path / "v"
    for how in ("torch", "4"):
        whole = written(path, steering_vector(rows()), how).read_bytes()
        for length in range(0, len(whole) - 1, 5):
            path.write_bytes(whole[:length])
            with pytest.raises(SteerError):
                read_steering_vector(path)
