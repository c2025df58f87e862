"""GGUF control vectors: of llama.cpp and repeng, EasySteer's variant, ours, and those that lie."""

import hashlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from artefacts import has_direction
from gguf import GGUFReader, GGUFWriter
from hypothesis import given
from hypothesis import strategies as st

from steer.artefacts.control_vector import ControlVector
from steer.errors import FileFormatError, SteerError, Unsupported
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.vectors.gguf import read_gguf, write_gguf

PLAIN = ImportOptions()
Rows = dict[str, np.ndarray]


def write_file(
    path: Path,
    tensors: Rows,
    *,
    architecture: str = "controlvector",
    more: Callable[[GGUFWriter], None] = lambda writer: None,
) -> Path:
    """As repeng's export_gguf and llama.cpp's cvector-generator do."""
    writer = GGUFWriter(path, architecture)
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_uint32("controlvector.layer_count", len(tensors))
    more(writer)
    for name, row in tensors.items():
        writer.add_tensor(name, row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def some_rows(*layers: int) -> Rows:
    generator = np.random.default_rng(0)
    return {f"direction.{n}": generator.normal(size=6).astype(np.float32) for n in layers}


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read_gguf(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


def test_a_file_of_repeng_or_llama_cpp(tmp_path: Path) -> None:
    tensors = some_rows(1, 2, 5)
    vector = read_gguf(write_file(tmp_path / "v", tensors), PLAIN)
    assert list(vector.directions) == [1, 2, 5]
    assert np.array_equal(vector[5].numpy(), tensors["direction.5"])
    assert vector.card.provenance == {
        "format": "gguf",
        "layer_offset": 0,
        "layer_names": {"1": "direction.1", "2": "direction.2", "5": "direction.5"},
        "file_sha256": hashlib.sha256((tmp_path / "v").read_bytes()).hexdigest(),
        "model_hint": "llama",
        "layer_count": 3,
    }
    assert (vector.card.layers, vector.card.width) == ((1, 2, 5), 6)


def test_an_explicit_offset_is_recorded(tmp_path: Path) -> None:
    path = write_file(tmp_path / "v", some_rows(1, 2))
    vector = read_gguf(path, ImportOptions(layer_offset=-1))
    assert list(vector.directions) == [0, 1]
    assert vector.card.provenance["layer_offset"] == -1
    assert refused(path, ImportOptions(layer_offset=-2)).code == "invalid_layer_offset"


def test_direction_0_needs_a_known_writer_or_an_offset(tmp_path: Path) -> None:
    path = write_file(tmp_path / "v", some_rows(0, 1))
    error = refused(path)
    assert (error.code, error.param) == ("layer_offset_required", "/layer_offset")
    assert list(read_gguf(path, ImportOptions(layer_offset=0)).directions) == [0, 1]
    easysteer = write_file(
        tmp_path / "e",
        some_rows(0, 1),
        more=lambda writer: writer.add_string("controlvector.method", "caa"),
    )
    vector = read_gguf(easysteer, PLAIN)
    assert list(vector.directions) == [0, 1]
    assert vector.card.provenance["method"] == "caa"


rows = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=3, max_size=3
).filter(has_direction)


@given(st.dictionaries(st.integers(1, 99), rows, min_size=1, max_size=5), st.text(max_size=20))
def test_our_vectors_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, directions: dict, description: str
) -> None:
    vector = ControlVector.of(
        {layer: torch.tensor(row) for layer, row in directions.items()},
        description=description,
        default_strength=0.5,
        model="m",
    )
    path = tmp_path_factory.mktemp("gguf") / "v"
    write_gguf(vector, path)
    assert read_artefact(path, PLAIN, scratch=None, unpacked_limit=0).to_bytes() == (
        vector.to_bytes()
    )


def test_export_is_laid_out_as_others_read_it(tmp_path: Path) -> None:
    vector = ControlVector.of(
        {n: torch.full((4,), float(n + 1)) for n in range(4)},
        model="demo",
        default_layers=(0, 2, 3),
    )
    with pytest.raises(Unsupported, match="block 0") as raised:
        write_gguf(vector, tmp_path / "v")
    assert raised.value.code == "layer_not_exportable"
    write_gguf(vector.on_layers((3, 1)), tmp_path / "v")
    reader = GGUFReader(tmp_path / "v")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["general.architecture"] == "controlvector"
    assert fields["controlvector.model_hint"] == "demo"
    assert fields["controlvector.layer_count"] == 2
    assert {t.name: t.data.tolist() for t in reader.tensors} == {
        "direction.1": [2.0] * 4,
        "direction.3": [4.0] * 4,
    }
    back = read_gguf(tmp_path / "v", PLAIN)
    assert (back.card.layers, back.card.default_layers) == ((1, 3), (3,))
    assert back.card.model == "demo"


def test_only_the_residual_stream_can_be_exported(tmp_path: Path) -> None:
    vector = ControlVector.of({1: torch.ones(4)}, site="attn_out")
    with pytest.raises(Unsupported, match="attn_out"):
        write_gguf(vector, tmp_path / "v")


WRONG: dict[str, Callable[[Path], Path]] = {
    "not_a_control_vector": lambda p: write_file(p, some_rows(1), architecture="llama"),
    "unknown_layout": lambda p: write_file(p, {"token_embd.weight": np.ones(4, np.float32)}),
    "unknown_layout ": lambda p: write_file(p, {"direction.01": np.ones(4, np.float32)}),
    "invalid_file": lambda p: write_file(p, {"direction.1": np.ones((2, 4), np.float32)}),
    "invalid_file ": lambda p: write_file(p, {"direction.1": np.ones(4, np.float16)}),
    "invalid_file  ": lambda p: write_file(p, {}),
    "mixed_widths": lambda p: write_file(
        p, {"direction.1": np.ones(4, np.float32), "direction.2": np.ones(5, np.float32)}
    ),
    "not_finite": lambda p: write_file(p, {"direction.1": np.full(4, np.nan, np.float32)}),
    "zero_vector": lambda p: write_file(p, {"direction.1": np.zeros(4, np.float32)}),
    "invalid_card": lambda p: write_file(
        p, some_rows(1), more=lambda writer: writer.add_string("steer.card", "[" * 100_000)
    ),
    "invalid_card ": lambda p: write_file(
        p, some_rows(1), more=lambda writer: writer.add_string("steer.card", "{}")
    ),
}


@pytest.mark.parametrize("code", WRONG)
def test_files_that_are_no_control_vector(tmp_path: Path, code: str) -> None:
    assert refused(WRONG[code](tmp_path / "v")).code == code.strip()


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


def header(*parts: bytes, version: int = 3, tensors: int = 0, keys: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", version, tensors, keys) + b"".join(parts)


ARCHITECTURE = text("general.architecture") + struct.pack("<I", 8) + text("controlvector")


def tensor(name: str, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


LYING = {
    "only the magic": b"GGUF",
    "a version from the future": header(version=4),
    "big-endian": header(version=3 << 24),
    "too many tensors": header(tensors=2**63),
    "too many keys": header(keys=2**63),
    "more keys than there are": header(ARCHITECTURE, keys=2),
    "an endless string": header(struct.pack("<Q", 2**62), keys=1),
    "an endless array": header(text("x") + struct.pack("<IIQ", 9, 4, 2**62), b"\0" * 64, keys=1),
    "an array of arrays": header(text("x") + struct.pack("<IIQ", 9, 9, 1), b"\0" * 64, keys=1),
    "an unknown type": header(text("x") + struct.pack("<I", 99), b"\0" * 64, keys=1),
    "no alignment": header(
        text("general.alignment") + struct.pack("<II", 4, 0), b"\0" * 64, keys=1
    ),
    "an alignment of 3": header(
        text("general.alignment") + struct.pack("<II", 4, 3), b"\0" * 64, keys=1
    ),
    "a key twice": header(ARCHITECTURE, ARCHITECTURE, keys=2),
    "a key of the reader's own": header(
        text("GGUF.version") + struct.pack("<II", 4, 1), b"\0" * 64, keys=1
    ),
    "not UTF-8": header(struct.pack("<Q", 2) + b"\xff\xfe" + struct.pack("<II", 4, 1), keys=1),
    "a huge tensor": header(
        ARCHITECTURE, tensor("direction.1", (2**61,)), b"\0" * 64, tensors=1, keys=1
    ),
    "an empty tensor": header(
        ARCHITECTURE, tensor("direction.1", (2**61, 0)), b"\0" * 64, tensors=1, keys=1
    ),
    "a tensor beyond the end": header(
        ARCHITECTURE, tensor("direction.1", (4,), offset=2**62), b"\0" * 64, tensors=1, keys=1
    ),
    "a tensor off its alignment": header(
        ARCHITECTURE, tensor("direction.1", (4,), offset=1), b"\0" * 64, tensors=1, keys=1
    ),
    "a tensor of many dimensions": header(
        ARCHITECTURE, tensor("direction.1", (1,) * 9), b"\0" * 64, tensors=1, keys=1
    ),
    "a tensor of no dimension": header(
        ARCHITECTURE, tensor("direction.1", ()), b"\0" * 64, tensors=1, keys=1
    ),
    "a tensor twice": header(
        ARCHITECTURE, tensor("direction.1", (4,)) * 2, b"\0" * 64, tensors=2, keys=1
    ),
}


@pytest.mark.parametrize("lie", LYING)
def test_files_that_lie_are_refused_at_once(tmp_path: Path, lie: str) -> None:
    path = tmp_path / "v.gguf"
    path.write_bytes(LYING[lie])
    tracemalloc.start()
    try:
        error = refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(error, FileFormatError)
    assert peak < 1 << 20


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    whole = write_file(tmp_path / "v", some_rows(1, 2)).read_bytes()
    path = tmp_path / "cut"
    last = max(t.data_offset + t.n_bytes for t in GGUFReader(tmp_path / "v").tensors)
    for length in range(1, last):
        path.write_bytes(whole[:length])
        assert isinstance(refused(path), FileFormatError)
    path.write_bytes(whole[:last])  # padding after the last tensor may be missing
    assert list(read_gguf(path, PLAIN).directions) == [1, 2]


@given(st.data())
def test_damaged_files_are_refused_or_read_but_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    folder = tmp_path_factory.mktemp("damaged")
    if data.draw(st.booleans()):
        write_file(folder / "v", some_rows(1, 2))
    else:
        write_gguf(ControlVector.of({1: torch.ones(4), 2: torch.ones(4)}), folder / "v")
    damaged = bytearray((folder / "v").read_bytes())
    for _ in range(data.draw(st.integers(1, 5))):
        damaged[data.draw(st.integers(4, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    (folder / "v").write_bytes(damaged)
    status = None
    try:
        vector = read_gguf(folder / "v", PLAIN)
        assert all(bool(row.isfinite().all()) for row in vector.directions.values())
        assert ControlVector.from_bytes(vector.to_bytes()).card == vector.card
    except SteerError as error:
        status = error.status
    assert status is None or 400 <= status < 500


def write_generator_file(path: Path, outputs: dict[int, np.ndarray]) -> Path:
    """As llama.cpp's cvector-generator does: block i's output is direction.{i+1}, int32 count."""
    writer = GGUFWriter(path, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    writer.add_int32("controlvector.layer_count", len(outputs))
    for block, row in outputs.items():
        writer.add_tensor(f"direction.{block + 1}", row)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_llama_cpps_generator_counts_one_late(tmp_path: Path) -> None:
    outputs = {block: np.full(4, block + 1, np.float32) for block in (0, 1, 2)}
    path = write_generator_file(tmp_path / "v", outputs)
    error = refused(path)
    assert (error.code, error.param) == ("layer_offset_required", "/layer_offset")
    assert "llama-cpp-generator" in error.message
    vector = read_gguf(path, ImportOptions(source="llama-cpp-generator"))
    assert {layer: float(row[0]) for layer, row in vector.directions.items()} == {0: 1, 1: 2, 2: 3}
    assert vector.card.provenance["layer_offset"] == -1
    assert vector.card.provenance["tool"] == "llama-cpp-generator"
    assert vector.card.provenance["layer_names"] == {
        "0": "direction.1",
        "1": "direction.2",
        "2": "direction.3",
    }
    # Read as llama.cpp itself applies them: one block later than they were measured.
    as_applied = read_gguf(path, ImportOptions(source="llama-cpp"))
    assert list(as_applied.directions) == [1, 2, 3]
    assert list(read_gguf(path, ImportOptions(layer_offset=0)).directions) == [1, 2, 3]


def test_direction_0_of_easysteer(tmp_path: Path) -> None:
    # Without its extra keys, nothing but the sender can say so.
    path = write_file(tmp_path / "v", some_rows(*range(28)))
    assert refused(path).code == "layer_offset_required"
    vector = read_gguf(path, ImportOptions(source="easysteer"))
    assert list(vector.directions) == list(range(28))
    with_keys = write_file(
        tmp_path / "k",
        some_rows(*range(28)),
        more=lambda writer: (
            writer.add_string("controlvector.method", "diffmean"),
            writer.add_bool("controlvector.normalize", True),
            writer.add_string("controlvector.token_pos", "last"),
        ),
    )
    known = read_gguf(with_keys, PLAIN)
    assert list(known.directions) == list(range(28))
    assert known.card.provenance["tool"] == "easysteer"
    assert known.card.provenance["normalize"] is True
    assert known.card.provenance["token_pos"] == "last"


def test_a_card_of_ours_is_not_moved(tmp_path: Path) -> None:
    write_gguf(ControlVector.of({1: torch.ones(4)}), tmp_path / "v")
    for options in (ImportOptions(layer_offset=1), ImportOptions(source="llama-cpp-generator")):
        assert refused(tmp_path / "v", options).code == "invalid_option"


@pytest.mark.parametrize("kind", ["add_uint32", "add_uint64", "add_int64"])
def test_a_count_of_the_models_layers_is_not_repengs_and_is_asked_about(
    tmp_path: Path, kind: str
) -> None:
    """Such a writer may name block i's output direction.{i+1}, one late."""

    def recount(writer: GGUFWriter) -> None:
        writer.kv_data[0].pop("controlvector.layer_count")
        getattr(writer, kind)("controlvector.layer_count", 4)

    path = write_file(tmp_path / "v", some_rows(1, 2, 3), more=recount)
    error = refused(path)
    assert (error.code, error.param) == ("layer_offset_required", "/layer_offset")
    assert "direction.{i+1}" in error.message
    late = read_gguf(path, ImportOptions(source="llama-cpp-generator"))
    assert late.card.layers == (0, 1, 2)
    assert read_gguf(path, ImportOptions(source="llama-cpp")).card.layers == (1, 2, 3)


UNHONOURED = {
    "dspark.mode": "project",
    "controlvector.operation": "ablate",
    "controlvector.hook_point": "router",
    "controlvector.scale": 2.0,
    "controlvector.normalize_hidden": True,
    "my.signs": "-1,1",
    "my.config": '{"mode": "project"}',
}


@pytest.mark.parametrize("key", UNHONOURED)
def test_a_key_that_changes_what_the_rows_mean_is_refused_by_name(tmp_path: Path, key: str) -> None:
    def add(writer: GGUFWriter) -> None:
        value = UNHONOURED[key]
        adders = {str: writer.add_string, float: writer.add_float32, bool: writer.add_bool}
        adders[type(value)](key, value)

    error = refused(write_file(tmp_path / "v", some_rows(1, 2), more=add))
    assert error.code == "unhonoured_metadata"
    assert key in error.message


def test_a_key_that_says_what_steer_does_or_knows_is_kept(tmp_path: Path) -> None:
    def add(writer: GGUFWriter) -> None:
        writer.add_string("controlvector.mode", "add")
        writer.add_float32("controlvector.scale", 1.0)
        writer.add_string("controlvector.hook_point", "ffn_out_pre_residual")
        writer.add_string("general.description", "scale 2, mode project")

    vector = read_gguf(write_file(tmp_path / "v", some_rows(1, 2), more=add), PLAIN)
    assert vector.card.site == "mlp_out"
    assert vector.card.provenance["mode"] == "add"
