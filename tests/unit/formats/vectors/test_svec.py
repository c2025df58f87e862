"""`.svec` files of IBM's activation-steering."""

import json
import tracemalloc
from pathlib import Path

import pytest

from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash

PLAIN = ImportOptions()
GOOD = {
    "model_type": "llama",
    "directions": {"3": [1.0, -2.5, 3e-5], "12": [0, 1, 2]},
    "explained_variances": {"3": 0.75, "12": 0.5},
}


def read(path: Path, options: ImportOptions = PLAIN):
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path)
    assert 400 <= raised.value.status < 500
    return raised.value


def written(folder: Path, value: object) -> Path:
    path = folder / "file.bin"
    path.write_text(value if isinstance(value, str) else json.dumps(value))
    return path


@pytest.mark.parametrize("indent", [None, 2])
def test_rows_by_block_and_what_is_recorded(tmp_path: Path, indent: int | None) -> None:
    path = written(tmp_path, json.dumps(GOOD, indent=indent))
    vector = read(path)
    assert list(vector.directions) == [3, 12]
    assert vector[3].double().tolist() == pytest.approx([1.0, -2.5, 3e-5])
    assert vector.card.provenance == {
        "format": "svec",
        "tool": "activation-steering",
        "layer_offset": 0,
        "layer_names": {"3": "3", "12": "12"},
        "file_sha256": file_hash(path),
        "model_type": "llama",
        "explained_variances": {"3": 0.75, "12": 0.5},
    }
    assert list(read(path, ImportOptions(layer_offset=1)).directions) == [4, 13]


def test_rows_that_are_wrapped_once_more(tmp_path: Path) -> None:
    assert read(written(tmp_path, {"directions": {"1": [[1, 2]]}}))[1].tolist() == [1, 2]


def test_lists_in_texts_change_nothing(tmp_path: Path) -> None:
    value = {"model_type": "a [1, 2] b", "directions": {"1": [1, 2]}, "more": [7]}
    assert read(written(tmp_path, value))[1].tolist() == [1, 2]


WRONG = {
    "unknown_layout": "{}",
    "unknown_layout ": '{"directions": []}',
    "unknown_layout  ": '{"interventions": [{"kind": "add"}]}',
    "invalid_json": '{"directions": {"1": [1, 2]',
    "invalid_json ": '{"directions": {"1": [1]}} more',
    "invalid_json  ": '{"directions": {"1": [1], "1": [2]}}',
    "invalid_json   ": '{"a": ' * 100_000,
    "too_large": '{"a": "' + "x" * (1 << 20) + '"}',
    "too_large ": '{"a": [' + "[]," * 100_000 + "[]]}",
    "invalid_file": '{"directions": {"x": [1]}}',
    "invalid_file ": '{"directions": {"1": [NaN]}}',
    "invalid_file  ": '{"directions": {"1": [1..2]}}',
    "invalid_file   ": '{"directions": {"1": [1e999]}}',
    "invalid_file    ": '{"directions": {"1": "x"}}',
    "invalid_file     ": '{"directions": {"1": [[1], [2]]}}',
    "invalid_file      ": '{"directions": {"1": []}}',
    "invalid_file       ": '{"directions": {"1": [9' + "9" * 400 + "]}}",
    "mixed_widths": '{"directions": {"1": [1], "2": [1, 2]}}',
    "zero_vector": '{"directions": {"1": [0.0]}}',
}


@pytest.mark.parametrize("code", WRONG)
def test_what_is_no_vector(tmp_path: Path, code: str) -> None:
    assert refused(written(tmp_path, WRONG[code])).code == code.strip()


def test_numbers_do_not_pile_up_in_memory(tmp_path: Path) -> None:
    """Two bytes a number is the worst that JSON can do; Python's own reader needs 36 for each."""
    row = "[" + ",".join("7" * 60_000) + "]"
    path = written(
        tmp_path, '{"directions": {' + ", ".join(f'"{n}": {row}' for n in range(40)) + "}}"
    )
    tracemalloc.start()
    try:
        vector = read(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(vector.directions) == 40
    assert peak < path.stat().st_size + (4 << 20)
