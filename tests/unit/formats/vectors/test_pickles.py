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

import joblib
import numpy as np
import pytest
import torch

from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash
from steer.formats.vectors.pickles import convert_pickle

PLAIN = ImportOptions()
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
    elif how == "npy":
        with path.open("wb") as stream:
            np.save(stream, np.array(value, dtype=object) if isinstance(value, dict) else value)
    elif how.startswith("joblib"):
        joblib.dump(value, path, compress=how.removeprefix("joblib ") if " " in how else 0)
    else:
        path.write_bytes(pickle.dumps(value, protocol=int(how)))
    return path


HOW = ["torch", "2", "3", "4", "5", "joblib", "joblib zlib", "joblib xz"]


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_are_equal(
    tmp_path: Path, steering_vector: Callable[..., Any], how: str, dtype: torch.dtype
) -> None:
    path = written(tmp_path / "v", steering_vector(rows(dtype)), how)
    vector = convert_pickle(path, PLAIN)
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
    assert convert_pickle(path, PLAIN).card.site == site


@pytest.mark.parametrize("layer_type", ["input_layernorm", "post_attention_layernorm"])
def test_norms_are_refused_by_name(
    tmp_path: Path, steering_vector: Callable[..., Any], layer_type: str
) -> None:
    path = written(tmp_path / "v", steering_vector(rows(), layer_type), "torch")
    with pytest.raises(SteerError, match=layer_type) as raised:
        convert_pickle(path, PLAIN)
    assert raised.value.code == "unsupported_site"
    assert "decoder_block" in raised.value.message


@pytest.mark.parametrize("how", HOW)
def test_the_server_goes_on_refusing_them(
    tmp_path: Path, steering_vector: Callable[..., Any], how: str
) -> None:
    path = written(tmp_path / "v", steering_vector(rows()), how)
    with pytest.raises(SteerError) as raised:
        read_artefact(path, PLAIN, scratch=tmp_path / "s", unpacked_limit=1 << 20)
    if " " in how:
        assert raised.value.code == "unknown_format"
        return
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
        convert_pickle(path, PLAIN)
    assert raised.value.code == "pickle_refused"
    assert not trace.exists()


def test_other_classes_of_the_package_are_refused(
    tmp_path: Path, steering_vector: Callable[..., Any]
) -> None:
    other = type("Other", (), {"__module__": MODULE})
    sys.modules[MODULE].Other = other  # type: ignore[attr-defined]
    with pytest.raises(SteerError, match=r"steering_vector\.Other"):
        convert_pickle(written(tmp_path / "v", other(), "4"), PLAIN)


def test_a_storage_that_lies_about_its_length(
    tmp_path: Path, steering_vector: Callable[..., Any]
) -> None:
    data = pickle.dumps(steering_vector({0: torch.ones(5)}), protocol=4)
    inner = (5).to_bytes(8, "little") + b"\0\0\x80\x3f" * 5
    assert data.count(inner) == 1
    (tmp_path / "v").write_bytes(data.replace(inner, (6).to_bytes(8, "little") + inner[8:]))
    with pytest.raises(SteerError) as raised:
        convert_pickle(tmp_path / "v", PLAIN)
    assert raised.value.code == "truncated_file"


@pytest.mark.parametrize("value", [5, {"layer_activations": {}}, {"a": {1, 2}}, ["a row"]])
def test_what_holds_no_vector_is_not_converted(tmp_path: Path, value: Any) -> None:
    with pytest.raises(SteerError) as raised:
        convert_pickle(written(tmp_path / "v", value, "torch"), PLAIN)
    assert raised.value.code in ("unknown_layout", "pickle_refused")


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
            convert_pickle(written(tmp_path / "v", made, "4"), PLAIN)
        assert 400 <= raised.value.status < 500


def test_every_truncation_is_refused(tmp_path: Path, steering_vector: Callable[..., Any]) -> None:
    path = tmp_path / "v"
    for how in ("torch", "4"):
        whole = written(path, steering_vector(rows()), how).read_bytes()
        for length in range(0, len(whole) - 1, 5):
            path.write_bytes(whole[:length])
            with pytest.raises(SteerError):
                convert_pickle(path, PLAIN)


def arrays(dtype: str = "<f4") -> dict[int, np.ndarray]:
    return {2: np.arange(1, 5).astype(dtype), 5: np.arange(8).reshape(2, 4)[1].astype(dtype)}


HELD: dict[str, tuple[Callable[[], Any], ImportOptions]] = {
    "arrays by layer": (arrays, PLAIN),
    "half precision": (lambda: arrays("<f2"), PLAIN),
    "float64": (lambda: arrays("<f8"), PLAIN),
    "tensors by layer": (
        lambda: {layer: torch.from_numpy(row) for layer, row in arrays().items()},
        PLAIN,
    ),
    "under a name": (lambda: {"directions": arrays(), "note": "x"}, PLAIN),
    "a matrix by columns": (
        lambda: np.asfortranarray(np.stack([*[np.ones(4)] * 2, *arrays("<f8").values()])),
        ImportOptions(layer_offset=0),
    ),
    "a row": (lambda: arrays()[2], ImportOptions(layers=(2,), source="blocks")),
}


@pytest.mark.parametrize("what", HELD)
@pytest.mark.parametrize("how", HOW)
def test_arrays_in_pickles_are_converted_as_tensors_are_read(
    tmp_path: Path, how: str, what: str
) -> None:
    make, options = HELD[what]
    vector = convert_pickle(written(tmp_path / "v", make(), how), options)
    assert torch.equal(vector[2], torch.tensor([1.0, 2.0, 3.0, 4.0]))


def test_arrays_are_asked_about_as_tensors_are(tmp_path: Path) -> None:
    matrix = written(tmp_path / "m", np.ones((3, 4), np.float32), "4")
    row = written(tmp_path / "r", np.ones(4, np.float32), "4")
    for path, options, code in (
        (matrix, PLAIN, "layer_offset_required"),
        (row, PLAIN, "layer_required"),
        (row, ImportOptions(layers=(2,)), "site_required"),
    ):
        with pytest.raises(SteerError) as raised:
            convert_pickle(path, options)
        assert raised.value.code == code


def test_an_upload_with_arrays_says_to_convert_it(tmp_path: Path) -> None:
    path = written(tmp_path / "v", arrays(), "torch")
    with pytest.raises(SteerError, match="steer vectors convert") as raised:
        read_artefact(path, PLAIN, scratch=None, unpacked_limit=0)
    assert raised.value.code == "pickle_refused"


ODD_ARRAYS: dict[str, Any] = {
    "objects": np.array([{"a": 1}], dtype=object),
    "a record": np.zeros(2, dtype=[("a", "<f4")]),
    "big-endian": np.ones(4, ">f4"),
    "complex": np.ones(4, np.complex64),
    "texts": np.array(["a"]),
}


LISTS = ("objects", "texts")


@pytest.mark.parametrize("what", ODD_ARRAYS)
@pytest.mark.parametrize("how", ["2", "5", "joblib"])
def test_other_arrays_are_refused(tmp_path: Path, how: str, what: str) -> None:
    with pytest.raises(SteerError) as raised:
        convert_pickle(written(tmp_path / "v", {2: ODD_ARRAYS[what]}, how), PLAIN)
    assert raised.value.code == ("unknown_layout" if what in LISTS else "pickle_refused")


def test_an_array_that_lies_about_its_shape(tmp_path: Path) -> None:
    whole = pickle.dumps({2: np.ones(4, np.float32)}, protocol=4)
    (tmp_path / "v").write_bytes(whole.replace(b"K\x04\x85", b"K\x05\x85"))
    with pytest.raises(SteerError) as raised:
        convert_pickle(tmp_path / "v", PLAIN)
    assert raised.value.code == "truncated_file"


@pytest.mark.parametrize("compress", [0, "zlib", "gzip", "bz2", "lzma", "xz"])
def test_every_truncation_of_a_joblib_file_is_refused(tmp_path: Path, compress: Any) -> None:
    joblib.dump({2: np.ones((3, 4)), 3: np.array(["a"], object)}, tmp_path / "v", compress=compress)
    whole = (tmp_path / "v").read_bytes()
    for length in range(1, len(whole)):
        (tmp_path / "v").write_bytes(whole[:length])
        with pytest.raises(SteerError):
            convert_pickle(tmp_path / "v", PLAIN)


def test_what_decompresses_to_too_much(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    joblib.dump({2: np.zeros(100_000, np.float32)}, tmp_path / "v", compress=9)
    monkeypatch.setattr("steer.formats.guards.pickled_files.MAX_BYTES", 10_000)
    with pytest.raises(SteerError) as raised:
        convert_pickle(tmp_path / "v", PLAIN)
    assert raised.value.code == "too_large"


def test_joblib_and_lz4(tmp_path: Path) -> None:
    (tmp_path / "v").write_bytes(b"\x04\x22\x4d\x18" + bytes(40))
    with pytest.raises(SteerError, match="lz4"):
        convert_pickle(tmp_path / "v", PLAIN)


@pytest.mark.parametrize("key", [True, 1.0])
def test_a_key_that_is_no_layer_is_not_taken_for_one(tmp_path: Path, key: Any) -> None:
    with pytest.raises(SteerError) as raised:
        convert_pickle(written(tmp_path / "v", {key: np.ones(4, np.float32)}, "4"), PLAIN)
    assert raised.value.code == "layer_required"


@pytest.mark.parametrize("what", ["arrays by layer", "tensors by layer", "under a name"])
def test_a_dictionary_that_numpy_saved(tmp_path: Path, what: str) -> None:
    make, options = HELD[what]
    path = written(tmp_path / "v.npy", make(), "npy")
    assert torch.equal(convert_pickle(path, options)[2], torch.tensor([1.0, 2.0, 3.0, 4.0]))
    with pytest.raises(SteerError, match="steer vectors convert") as raised:
        read_artefact(path, options, scratch=None, unpacked_limit=0)
    assert raised.value.code == "pickle_refused"


def test_an_array_that_numpy_saved_is_imported_as_it_is(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones((3, 4)))
    with pytest.raises(SteerError, match="steer vectors import"):
        convert_pickle(tmp_path / "v.npy", PLAIN)
