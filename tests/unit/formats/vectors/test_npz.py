"""NumPy archives: rows by layer, one matrix, one row; and archives that lie."""

import io
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from artefacts import has_direction
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib import format as npy

from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash

PLAIN = ImportOptions()


def read(path: Path, options: ImportOptions = PLAIN):
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


def saved(folder: Path, save: Callable[..., None] = np.savez, **arrays: np.ndarray) -> Path:
    with (folder / "file.bin").open("wb") as stream:  # the name says nothing
        save(stream, **arrays)
    return folder / "file.bin"


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_rows_named_by_layer(tmp_path: Path, dtype: str, save: Callable[..., None]) -> None:
    rows = {n: np.linspace(0.5, 2, 5).astype(dtype) * n for n in (2, 11)}
    path = saved(tmp_path, save, **{f"layer_{n}": row for n, row in rows.items()})
    vector = read(path)
    assert list(vector.directions) == [2, 11]
    for n, row in rows.items():
        assert torch.equal(vector[n], torch.from_numpy(row.astype("<f4")))
    assert vector.card.provenance == {
        "format": "npz",
        "layer_offset": 0,
        "layer_names": {"2": "layer_2", "11": "layer_11"},
        "file_sha256": file_hash(path),
    }
    assert list(read(path, ImportOptions(layer_offset=-1)).directions) == [1, 10]


@pytest.mark.parametrize("order", ["C", "F"])
def test_a_matrix_needs_a_word_about_its_first_row(tmp_path: Path, order: str) -> None:
    matrix = np.asarray(np.arange(20.0).reshape(4, 5) + 1, order=order)
    path = saved(tmp_path, vectors=matrix)
    assert refused(path).code == "layer_offset_required"
    blocks = read(path, ImportOptions(source="blocks"))
    assert [row[0].item() for row in blocks.directions.values()] == [1, 6, 11, 16]
    assert list(blocks.directions) == [0, 1, 2, 3]
    # Row 0 is the embeddings, so the output of block k is row k + 1.
    states = read(path, ImportOptions(source="hidden-states"))
    assert {n: row[0].item() for n, row in states.directions.items()} == {0: 6, 1: 11, 2: 16}
    assert states.card.provenance["layer_names"]["0"] == "vectors[1]"
    assert states.card.provenance["layer_offset"] == -1


@pytest.mark.parametrize("shape", [(4,), (1, 4), (4, 1), (1, 1, 4)])
def test_one_row_needs_a_layer_and_a_side_of_it(tmp_path: Path, shape: tuple[int, ...]) -> None:
    path = saved(tmp_path, direction=np.ones(shape))
    assert refused(path).code == "layer_required"
    assert refused(path, ImportOptions(layers=(7,))).code == "site_required"
    vector = read(path, ImportOptions(layers=(7,), source="blocks"))
    assert (list(vector.directions), vector.card.site) == ([7], "resid_post")


def member(name: str, data: bytes, method: int = zipfile.ZIP_STORED) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w", method) as file:
            file.writestr(name, data)

    return write


def array(shape: tuple[int, ...], data: bytes, descr: str = "<f4") -> bytes:
    stream = io.BytesIO()
    npy.write_array_header_1_0(stream, {"descr": descr, "fortran_order": False, "shape": shape})
    return stream.getvalue() + data


LYING = {
    "truncated_file": member("0.npy", array((1 << 40,), b"\0" * 16)),
    "truncated_file ": member("0.npy", array((1 << 62, 1 << 62), b"\0" * 16)),
    "truncated_file  ": member("0.npy", array((2,), b"\0" * 16)),
    "truncated_file   ": member("0.npy", array((0, 4), b"\0" * 16)),
    "invalid_file": member("0.npy", array((4,), b"\0" * 16, "<i4")),
    "invalid_file ": member("0.npy", b"\x93NUMPY\x01\x00\x04\x00abcd"),
    "invalid_file  ": member("0.npy", b"\x93NUMPY\x01\x00\xff\xff" + b"(" * 0xFFFF),
    "invalid_file   ": member("0.npy", b"hello"),
    "invalid_file    ": member("0.npy", array((0,), b"")),
    "archive_too_large": member(
        "0.npy", array((16 << 20,), b"\0" * (64 << 20)), zipfile.ZIP_DEFLATED
    ),
    "unknown_layout": member("mean.npy", array((2, 2, 2), b"\0\0\x80\x3f" * 8)),
    "zero_vector": member("0.npy", array((4,), b"\0" * 16)),
    "not_finite": member("0.npy", array((1,), b"\0\0\x80\x7f")),
}


@pytest.mark.parametrize("code", LYING)
def test_files_that_lie(tmp_path: Path, code: str) -> None:
    LYING[code](tmp_path / "v")
    found = refused(tmp_path / "v", ImportOptions(layers=(0,))).code
    assert found == code.strip() or (code == "unknown_layout" and found == "invalid_file")


def test_pickled_objects_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, layer_0=np.array([{"a": 1}], dtype=object))
    assert refused(path).code == "pickle_refused"


def test_keys_that_are_no_layers(tmp_path: Path) -> None:
    assert refused(saved(tmp_path, a=np.ones(3), b=np.ones(3))).code == "unknown_layout"
    rows = {"1": np.ones(3), "layer_1": np.ones(3)}
    assert refused(saved(tmp_path, **rows)).code == "duplicate_layer"


@given(
    st.dictionaries(
        st.integers(0, 99),
        st.lists(
            st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3
        ).filter(has_direction),
        min_size=1,
        max_size=5,
    )
)
def test_numbers_come_back_exactly(tmp_path_factory: pytest.TempPathFactory, rows: dict) -> None:
    folder = tmp_path_factory.mktemp("npz")
    path = saved(folder, **{str(n): np.array(row, np.float32) for n, row in rows.items()})
    vector = read(path)
    assert {n: row.tolist() for n, row in vector.directions.items()} == rows


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f4", "<f8", "<f2"])
def test_an_array_in_a_file_of_its_own(tmp_path: Path, dtype: str, order: str) -> None:
    matrix = np.asarray(np.arange(20).reshape(4, 5) + 1, dtype=dtype, order=order)
    np.save(tmp_path / "v.npy", matrix)
    assert refused(tmp_path / "v.npy").code == "layer_offset_required"
    states = read(tmp_path / "v.npy", ImportOptions(source="hidden-states"))
    assert {n: row[0].item() for n, row in states.directions.items()} == {0: 6, 1: 11, 2: 16}
    assert states.card.provenance["format"] == "npy"
    np.save(tmp_path / "v.npy", matrix[1])
    assert refused(tmp_path / "v.npy").code == "layer_required"
    row = read(tmp_path / "v.npy", ImportOptions(layers=(7,), source="blocks"))
    assert torch.equal(row[7], torch.tensor([6.0, 7, 8, 9, 10]))


@pytest.mark.parametrize(
    ("array", "code"),
    [
        (np.arange(4), "invalid_file"),
        (np.array({12: np.ones(4)}, object), "pickle_refused"),
        (np.ones((2, 2, 2, 3)), "invalid_file"),
        (np.float32(3), "invalid_file"),
    ],
)
def test_a_file_of_another_array_is_refused(tmp_path: Path, array: np.ndarray, code: str) -> None:
    np.save(tmp_path / "v.npy", array)
    assert refused(tmp_path / "v.npy", ImportOptions(source="blocks", layers=(1,))).code == code


def test_every_truncation_of_a_file_of_its_own_is_refused(tmp_path: Path) -> None:
    np.save(tmp_path / "v.npy", np.ones(4, np.float32))
    whole = (tmp_path / "v.npy").read_bytes()
    for length in range(1, len(whole)):
        (tmp_path / "v.npy").write_bytes(whole[:length])
        refused(tmp_path / "v.npy", ImportOptions(layers=(7,), source="blocks"))
