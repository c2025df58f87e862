"""`.pt` files: persona vectors, refusal directions, dictionaries; and files that hold more.

Layer numbers are checked against rows whose numbers say which layer they are: row k is all k + 1.
"""

import io
import os
import pickle
import struct
import tracemalloc
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, SteerError
from steer.formats.guards.torch import check_torch_file, load_tensors
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash

PLAIN = ImportOptions()
LAYERS, WIDTH = 4, 6


def marked(*shape: int, first: float = 1.0) -> torch.Tensor:
    """Row k of the last axis but one is all `first + k`."""
    count = shape[-2]
    rows = (torch.arange(count) + first).reshape(count, 1)
    return rows.expand(*shape).contiguous()


def saved(folder: Path, value: Any, name: str = "file.bin") -> Path:
    folder.mkdir(exist_ok=True)
    torch.save(value, folder / name)
    return folder / name


def read(path: Path, options: ImportOptions = PLAIN) -> Any:
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


def first_numbers(vector: ControlVector) -> dict[int, float]:
    return {layer: float(row[0]) for layer, row in vector.directions.items()}


def test_persona_vectors_begin_with_the_embeddings(tmp_path: Path) -> None:
    # Row k is hidden_states[k]: row 0 the embeddings, row 1 the output of block 0.
    path = saved(tmp_path, marked(LAYERS + 1, WIDTH))
    vector = read(path, ImportOptions(source="persona-vectors"))
    assert first_numbers(vector) == {0: 2.0, 1: 3.0, 2: 4.0, 3: 5.0}
    assert vector.card.site == "resid_post"
    assert vector.card.provenance == {
        "format": "torch",
        "tool": "persona-vectors",
        "layer_offset": -1,
        "layer_names": {str(n): f"tensor[{n + 1}]" for n in range(LAYERS)},
        "file_sha256": file_hash(path),
    }


def test_an_array_alone_does_not_say_what_its_first_row_is(tmp_path: Path) -> None:
    path = saved(tmp_path, marked(LAYERS, WIDTH))
    error = refused(path)
    assert (error.code, error.param) == ("layer_offset_required", "/layer_offset")
    assert list(read(path, ImportOptions(source="blocks")).directions) == [0, 1, 2, 3]
    assert first_numbers(read(path, ImportOptions(layer_offset=2))) == {2: 1, 3: 2, 4: 3, 5: 4}


def test_mean_differences_are_of_the_inputs_of_layers(tmp_path: Path) -> None:
    whole = torch.stack([marked(LAYERS, WIDTH, first=10.0 * pos) for pos in range(3)])
    whole[2, 0] = 0  # the template's last token: every prompt has the same embedding there
    path = saved(tmp_path, whole)
    options = ImportOptions(source="refusal-direction", position=-1)
    vector = read(path, options)
    assert vector.card.site == "resid_pre"
    assert first_numbers(vector) == {1: 21.0, 2: 22.0, 3: 23.0}
    assert vector.card.provenance["position"] == -1
    assert refused(path).param == "/from"
    assert refused(path, ImportOptions(source="refusal-direction")).param == "/position"
    assert refused(path, ImportOptions(source="refusal-direction", position=3)).param == "/position"


def test_a_refusal_direction_lies_at_the_input_of_its_layer(tmp_path: Path) -> None:
    saved(tmp_path / "run", torch.full((WIDTH,), 2.0, dtype=torch.float64), "direction.pt")
    (tmp_path / "run" / "direction_metadata.json").write_text('{"pos": -2, "layer": 3}')
    vector = read(tmp_path / "run")
    assert (vector.card.layers, vector.card.site) == ((3,), "resid_pre")
    assert vector[3].tolist() == [2.0] * WIDTH
    assert vector.card.provenance["position"] == -2
    assert vector.card.provenance["tool"] == "refusal-direction"
    with zipfile.ZipFile(tmp_path / "run.zip", "w") as file:
        for part in (tmp_path / "run").iterdir():
            file.write(part, f"run/{part.name}")
    unpacked = read_artefact(
        tmp_path / "run.zip", PLAIN, scratch=tmp_path / "scratch", unpacked_limit=1 << 20
    )
    assert unpacked.sha256 == vector.sha256
    (tmp_path / "run" / "direction_metadata.json").write_text('{"pos": -2, "layer": "3"}')
    assert refused(tmp_path / "run").code == "invalid_file"
    (tmp_path / "run" / "direction.pt").unlink()
    assert refused(tmp_path / "run").code == "unknown_layout"


@pytest.mark.parametrize("key", ["{}", "layer_{}", "layers.{}", "int"])
def test_a_dictionary_of_rows_by_layer(tmp_path: Path, key: str) -> None:
    rows = {(n if key == "int" else key.format(n)): torch.full((WIDTH,), n + 1.0) for n in (3, 1)}
    vector = read(saved(tmp_path, rows))
    assert first_numbers(vector) == {1: 2.0, 3: 4.0}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_views_and_types_keep_their_numbers(tmp_path: Path, dtype: torch.dtype) -> None:
    whole = torch.arange(24, dtype=dtype).reshape(4, 6)
    rows = {0: whole.T[1], 1: torch.nn.Parameter(whole[1:3, 2]), 2: whole[3, :2]}
    rows = {layer: row[:2] for layer, row in rows.items()}
    vector = read(saved(tmp_path, rows))
    for layer, row in rows.items():
        assert torch.equal(vector[layer], row.detach().float())


ONE_SIDE: list[tuple[dict[str, Any], str]] = [
    ({"source": "blocks"}, "resid_post"),
    ({"source": "refusal-direction"}, "resid_pre"),
    ({"site": "resid_mid"}, "resid_mid"),
]


@pytest.mark.parametrize(("said", "site"), ONE_SIDE)
def test_one_row_needs_a_layer_and_a_side_of_it(tmp_path: Path, said: dict, site: str) -> None:
    """A refusal direction.pt counts inputs: a layer alone would put it one site late."""
    path = saved(tmp_path, torch.ones(WIDTH))
    asked = refused(path)
    assert (asked.code, asked.param) == ("layer_required", "/layers")
    asked_again = refused(path, ImportOptions(layers=(2, 3)))
    assert (asked_again.code, asked_again.param) == ("site_required", "/site")
    for error in (asked, asked_again):
        assert "refusal-direction" in error.message
        assert "blocks" in error.message
        assert "site" in error.message
    vector = read(path, ImportOptions(layers=(2, 3), **said))
    assert (list(vector.directions), vector.card.site) == ([2, 3], site)


@pytest.mark.parametrize("source", ["hidden-states", "persona-vectors"])
def test_one_row_is_not_counted_as_the_rows_of_an_array(tmp_path: Path, source: str) -> None:
    path = saved(tmp_path, torch.ones(WIDTH))
    error = refused(path, ImportOptions(layers=(2,), source=source))
    assert (error.code, error.param) == ("invalid_option", "/from")
    assert "hidden_states[k] is the output of block k - 1" in error.message


def test_sources_that_do_not_fit_the_file(tmp_path: Path) -> None:
    path = saved(tmp_path, {"0": torch.ones(WIDTH)})
    for source in ("repeng", "llama-cpp-generator"):
        error = refused(path, ImportOptions(source=source))
        assert (error.code, error.param) == ("invalid_option", "/from")
    with pytest.raises(SteerError, match="known are"):
        ImportOptions(source="somebody")
    with pytest.raises(SteerError, match="leave out"):
        ImportOptions(source="blocks", layer_offset=1)


class Harmful:
    """Makes a folder when unpickled, which shows that it was."""

    def __init__(self, folder: Path) -> None:
        self._folder = str(folder)

    def __reduce__(self) -> Any:
        return os.mkdir, (self._folder,)


MORE_THAN_TENSORS: dict[str, Any] = {
    "a module": lambda path: torch.nn.Linear(2, 2),
    "code": Harmful,
    "a set": lambda path: {1, 2},
    "sparse": lambda path: torch.ones(2, 2).to_sparse(),
    "a dtype": lambda path: {"0": torch.ones(3), "dtype": torch.float32},
    "a tuple for a key": lambda path: {(1, 2): torch.ones(3)},
    "complex": lambda path: torch.ones(3, dtype=torch.complex64),
}


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8, torch.bool])
def test_whole_numbers_are_refused_as_such(tmp_path: Path, dtype: torch.dtype) -> None:
    error = refused(saved(tmp_path, torch.ones(4, dtype=dtype)), ImportOptions(layers=(1,)))
    assert error.code == "invalid_file"
    assert str(dtype) in error.message


@pytest.mark.parametrize("what", MORE_THAN_TENSORS)
def test_more_than_tensors_is_refused_by_name(tmp_path: Path, what: str) -> None:
    trace = tmp_path / "was here"
    path = saved(tmp_path, MORE_THAN_TENSORS[what](trace))
    error = refused(path)
    assert error.code == "pickle_refused", error
    assert not trace.exists()


def test_plain_values_are_no_vector(tmp_path: Path) -> None:
    for value in ({"layers": [1, 2.5, None, "x"]}, [torch.ones(2), "x"], {}):
        assert refused(saved(tmp_path, value)).code in ("unknown_layout", "invalid_file")


def rewritten(path: Path, **changed: bytes) -> Path:
    """The file with some members replaced, as a zip that only stores."""
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    top = next(iter(members)).split("/")[0]
    for name, data in changed.items():
        members[f"{top}/{name.replace('__', '/').replace('_pkl', '.pkl')}"] = data
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
    return path


def program(path: Path) -> bytes:
    with zipfile.ZipFile(path) as file:
        return file.read(next(name for name in file.namelist() if name.endswith("data.pkl")))


def test_a_storage_that_is_shorter_than_declared(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.ones(4))
    code = program(path)
    assert code.count(b"K\x04") == 2  # the storage's length and the tensor's
    lying = code.replace(b"K\x04", b"J\xff\xff\xff\x7f", 1)
    assert refused(rewritten(path, data_pkl=lying)).code == "truncated_file"
    assert refused(rewritten(path, data_pkl=code, data__0=b"\0" * 12)).code == "truncated_file"


def test_a_view_of_any_size_from_one_number(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.ones(1).expand(1 << 30))
    tracemalloc.start()
    try:
        error = refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert error.code == "truncated_file"
    assert peak < 4 << 20


def op(name: bytes, text: str) -> bytes:
    return name + struct.pack("<I", len(text)) + text.encode()


PROGRAMS = {
    "a huge memo": b"\x80\x02}r" + struct.pack("<I", 2**31) + b".",
    "a huge text": b"\x80\x02X" + struct.pack("<I", 2**31) + b"a.",
    "nested tuples for a key": b"\x80\x02}N" + b"q\x00h\x00\x86" * 60 + b"Ns.",
    "an extension": b"\x80\x02\x82\x01.",
    "an instance": b"(cos\nsystem\nX\x01\0\0\0aio.",
    "a name without a stop": b"\x80\x02ctorch.storage\n_load_from_bytes\n",
    "a persistent id of text": b"\x80\x02Pabc\n.",
    "nothing": b"",
    "a stack that is empty": b"\x80\x02.",
    "a name from nested tuples": b"\x80\x02N" + b"q\x00h\x00\x86" * 60 + b"N\x93.",
    "a mark that is missing": b"\x80\x02t.",
    "a call of a text": b"\x80\x02" + op(b"X", "a") + b")R.",
}


@pytest.mark.parametrize("what", PROGRAMS)
def test_programs_that_are_no_tensors(tmp_path: Path, what: str) -> None:
    path = rewritten(saved(tmp_path, torch.ones(4)), data_pkl=PROGRAMS[what])
    tracemalloc.start()
    try:
        error = refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(error, FileFormatError)
    assert peak < 4 << 20


def test_zips_that_torch_never_writes(tmp_path: Path) -> None:
    path = saved(tmp_path, torch.ones(64))
    whole = path.read_bytes()
    with zipfile.ZipFile(path) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, data in members.items():
            file.writestr(name, data)
    assert refused(path).code == "unsafe_archive"
    path.write_bytes(whole + b"more")
    assert isinstance(refused(path), FileFormatError)
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
        file.comment = b"PK\x05\x06" + b"\0" * 18
    assert isinstance(refused(path), FileFormatError)
    top = next(iter(members)).split("/")[0]
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)
        file.writestr(f"{top}/code/__torch__.py", "print()")
    assert "TorchScript" in refused(path).message


def test_the_old_form_and_plain_pickles_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "file"
    torch.save({"0": torch.ones(3)}, path, _use_new_zipfile_serialization=False)
    assert refused(path).code == "pickle_refused"
    for protocol in (2, 3, 4, 5):
        path.write_bytes(pickle.dumps({"0": torch.ones(3)}, protocol=protocol))
        assert refused(path).code == "pickle_refused"


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    path = saved(tmp_path, {"0": torch.ones(3), "1": torch.ones(3)})
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        assert isinstance(refused(path), FileFormatError)


numbers = st.floats(width=32, allow_nan=False, allow_infinity=False)
trees = st.dictionaries(
    st.text(max_size=8) | st.integers(0, 10**6),
    st.lists(numbers, min_size=1, max_size=4).map(torch.tensor)
    | numbers
    | st.none()
    | st.booleans()
    | st.text(max_size=5)
    | st.lists(st.integers(-(2**40), 2**40), max_size=3),
    max_size=5,
)


@given(trees)
def test_what_torch_saves_passes_the_check_and_is_loaded_alike(
    tmp_path_factory: pytest.TempPathFactory, tree: dict[Any, Any]
) -> None:
    path = tmp_path_factory.mktemp("tree") / "t"
    torch.save(tree, path)
    check_torch_file(path)
    loaded = load_tensors(path)
    assert list(loaded) == list(tree)
    for key, value in tree.items():
        same = torch.equal(loaded[key], value) if torch.is_tensor(value) else loaded[key] == value
        assert same


def test_a_state_dict_with_its_metadata_is_tensors_alone() -> None:
    stream = io.BytesIO()
    torch.save(torch.nn.Linear(3, 2).state_dict(), stream)
    assert b"_metadata" in stream.getvalue()


def test_a_dictionary_in_itself_is_refused(tmp_path: Path) -> None:
    held: dict[str, Any] = {}
    held["a"] = held
    refused(saved(tmp_path, held))


@pytest.mark.parametrize("kind", [list, tuple])
@pytest.mark.parametrize("under", [None, "vectors"])
@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (WIDTH, 1)])
def test_a_list_of_rows_is_a_matrix(
    tmp_path: Path, kind: type, under: str | None, shape: tuple[int, ...]
) -> None:
    rows = kind(row.reshape(shape).clone() for row in marked(LAYERS, WIDTH))
    path = saved(tmp_path, rows if under is None else {under: rows, "note": "x"})
    assert refused(path).code == "layer_offset_required"
    assert first_numbers(read(path, ImportOptions(source="blocks"))) == {0: 1, 1: 2, 2: 3, 3: 4}
    states = read(path, ImportOptions(source="hidden-states"))
    assert first_numbers(states) == {0: 2, 1: 3, 2: 4}


@pytest.mark.parametrize("rows", [[torch.ones(3), torch.ones(4)], [torch.ones(2, 3)] * 2, [1, 2]])
def test_a_list_of_other_things_is_refused(tmp_path: Path, rows: Any) -> None:
    assert refused(saved(tmp_path, rows), ImportOptions(source="blocks")).code == "unknown_layout"
