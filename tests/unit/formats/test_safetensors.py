"""Vectors and adapters in safetensors files: ours, other tools', and those that lie."""

import hashlib
import json
import pickle
import tracemalloc
from pathlib import Path

import pytest
import torch
from artefacts import has_direction
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save, save_file

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.control_vector import Card, ControlVector, LayerMeasure, LowRankAdapter
from steer.errors import FileFormatError, SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.spec import Where

PLAIN = ImportOptions()


def read(path: Path, options: ImportOptions = PLAIN):
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


def written(tmp_path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    path = tmp_path / "file.bin"  # the name says nothing
    unshared = {key: tensor.clone() for key, tensor in tensors.items()}
    save_file(unshared, path, metadata=metadata or None)
    return path


rows = st.lists(
    st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=5, max_size=5
).filter(has_direction)
vectors = st.dictionaries(st.integers(0, 200), rows, min_size=1, max_size=6).map(
    lambda found: {layer: torch.tensor(row) for layer, row in found.items()}
)


@given(vectors, st.text(max_size=30), st.floats(-9, 9))
def test_canonical_files_come_back_exactly(
    tmp_path_factory: pytest.TempPathFactory, directions, description: str, strength: float
) -> None:
    vector = ControlVector.of(
        directions,
        description=description,
        default_strength=strength,
        default_where=Where(phases=("generation",), except_=Where(tokens=(1, "x"))),
        measures={layer: LayerMeasure(separation=1.5) for layer in directions},
        provenance={"method": "mean", "pairs": [1, 2.5, None]},
    )
    path = tmp_path_factory.mktemp("canonical") / "v"
    path.write_bytes(vector.to_bytes())
    back = read(path)
    assert back.card == vector.card
    assert back.to_bytes() == vector.to_bytes()
    assert all(torch.equal(back[layer], vector[layer]) for layer in vector.directions)


_TWO = (torch.randn(2, 4), torch.randn(2, 4), torch.randn(2))
_ROWS = (torch.randn(4), torch.randn(4))


@pytest.mark.parametrize(
    "artefact",
    [
        LowRankAdapter.of({2: _TWO}),
        LowRankAdapter.of({2: EditRows(*_TWO)}),
        LowRankAdapter.of({2: EditRows(*_TWO, torch.zeros(2)), 5: EditRows(*_TWO, torch.ones(2))}),
        AffineMap.of({1: Channels(*_ROWS)}),
        AffineMap.of({1: Channels(*_ROWS, -torch.ones(4), torch.full((4,), torch.inf))}),
    ],
    ids=["loreft", "linear rows", "rectified rows", "map", "bounded map"],
)
def test_a_canonical_adapter_or_map_comes_back_exactly(tmp_path: Path, artefact) -> None:
    path = tmp_path / "a"
    path.write_bytes(artefact.to_bytes())
    back = read(path)
    assert type(back) is type(artefact)
    assert back.to_bytes() == artefact.to_bytes()
    assert back.sha256 == artefact.sha256


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: LowRankAdapter.of({1: EditRows(*_TWO[:2], torch.zeros(3))}), "bias [3]"),
        (lambda: LowRankAdapter.of({1: EditRows(*_TWO), 2: _TWO}), "one form on all layers"),
        (
            lambda: LowRankAdapter.of({1: EditRows(*_TWO), 2: EditRows(*_TWO, torch.zeros(2))}),
            "one form on all layers",
        ),
        (lambda: AffineMap.of({1: Channels(*_ROWS, lower=_ROWS[0])}), "one bound"),
        (lambda: AffineMap.of({1: Channels(_ROWS[0], torch.zeros(3))}), "shift [3]"),
        (lambda: AffineMap.of({1: Channels(_ROWS[0] / 0, _ROWS[1])}), "NaN or Inf"),
        (lambda: AffineMap.of({}), "one width"),
    ],
)
def test_rows_that_disagree_are_no_artefact(make, says: str) -> None:
    with pytest.raises(FileFormatError) as raised:
        make()
    assert says in raised.value.message


@pytest.mark.parametrize(
    "artefact", [LowRankAdapter.of({2: EditRows(*_TWO)}), AffineMap.of({2: Channels(*_ROWS)})]
)
@pytest.mark.parametrize("change", ["missing", "more", "name"])
def test_a_card_beside_other_tensors_than_its_own_is_refused(
    tmp_path: Path, artefact, change: str
) -> None:
    tensors = {f"layers.2.{name}": row for name, row in artefact_rows(artefact).items()}
    if change == "missing":
        tensors.pop("layers.2.write" if "layers.2.write" in tensors else "layers.2.shift")
    else:
        tensors["layers.2.other" if change == "more" else "other"] = torch.ones(2)
    about = artefact.card.model_dump_json(by_alias=True, exclude={"name"})
    assert refused(written(tmp_path, tensors, steer=about)).code == "invalid_file"


def artefact_rows(artefact) -> dict[str, torch.Tensor]:
    parts = artefact.channels if isinstance(artefact, AffineMap) else artefact.parts
    return {name: row for name, row in parts[2]._asdict().items() if row is not None}


@pytest.mark.parametrize(
    "form", ["layers.{}", "layer.{}", "layer_{}", "direction.{}", "block_{}", "{}"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64])
def test_rows_named_by_layer(tmp_path: Path, form: str, dtype: torch.dtype) -> None:
    tensors = {form.format(layer): torch.randn(4).to(dtype) for layer in (10, 2)}
    vector = read(written(tmp_path, tensors), ImportOptions(layer_offset=1))
    assert list(vector.directions) == [3, 11]
    assert torch.equal(vector[11], tensors[form.format(10)].float())
    assert vector.card.provenance == {
        "format": "safetensors",
        "layer_offset": 1,
        "layer_names": {"3": form.format(2), "11": form.format(10)},
        "file_sha256": hashlib.sha256((tmp_path / "file.bin").read_bytes()).hexdigest(),
    }


def test_a_matrix_has_a_row_for_each_block(tmp_path: Path) -> None:
    matrix = torch.randn(5, 4)
    path = written(tmp_path, {"diff": matrix})
    plain = read(path)
    assert list(plain.directions) == [0, 1, 2, 3, 4]
    embeddings_first = read(path, ImportOptions(layer_offset=-1))
    assert list(embeddings_first.directions) == [0, 1, 2, 3]
    assert torch.equal(embeddings_first[0], matrix[1])


@pytest.mark.parametrize("shape", [(4,), (1, 4)])
def test_a_single_row_is_placed_by_the_options(tmp_path: Path, shape: tuple[int, ...]) -> None:
    row = torch.randn(shape)
    path = written(tmp_path, {"refusal": row})
    error = refused(path)
    assert (error.code, error.param) == ("layer_required", "/layers")
    vector = read(path, ImportOptions(layers=(7, 5)))
    assert list(vector.directions) == [5, 7]
    assert torch.equal(vector[7], row.reshape(-1))


def test_options_go_on_the_card(tmp_path: Path) -> None:
    path = written(tmp_path, {f"layers.{n}": torch.randn(4) for n in range(4)})
    where = Where(phases=("generation",))
    options = ImportOptions(
        layers=(3, 1, 3),
        strength=2.5,
        description="d",
        licence="CC0-1.0",
        model="m",
        where=where,
    )
    card = read(path, options).card
    assert card.default_layers == (1, 3)
    assert card.used_layers == (1, 3)
    assert (card.default_strength, card.description, card.licence) == (2.5, "d", "CC0-1.0")
    assert (card.model, card.default_where) == ("m", where)
    error = refused(path, ImportOptions(layers=(4,)))
    assert (error.code, error.param) == ("layer_not_in_vector", "/layers")


@pytest.mark.parametrize(
    "fields",
    [{"strength": float("nan")}, {"strength": float("inf")}, {"layers": ()}, {"layers": (-1,)}],
)
def test_options_that_make_no_sense(fields: dict) -> None:
    with pytest.raises(SteerError) as raised:
        ImportOptions(**fields)
    assert raised.value.code == "invalid_option"
    assert raised.value.param == "/" + next(iter(fields))


def test_loreft_adapters(tmp_path: Path) -> None:
    parts = {
        "layers.3.rotation": torch.randn(2, 4),
        "layers.3.weight": torch.randn(2, 4),
        "layers.3.bias": torch.randn(2),
    }
    adapter = read(written(tmp_path, parts), ImportOptions(layer_offset=2))
    assert isinstance(adapter, LowRankAdapter)
    assert adapter.card.layers == (5,)
    assert torch.equal(adapter.parts[5][1], parts["layers.3.weight"])
    del parts["layers.3.bias"]
    assert "layers.3.bias" in refused(written(tmp_path, parts)).message


ROW = torch.ones(4)
WRONG_TENSORS = {
    "not_finite": {"layers.0": ROW * float("nan")},
    "not_finite ": {"layers.0": ROW * float("inf")},
    "not_finite  ": {"layers.0": ROW.double() * 1e300},
    "norm_out_of_range": {"layers.0": ROW, "layers.1": ROW * 1e-30},
    "norm_out_of_range ": {"layers.0": ROW * 1e-45},
    "norm_out_of_range  ": {"layers.0": ROW * 1e30},
    "norm_out_of_range   ": {"layers.0": torch.tensor([3e38, -3e38])},
    "zero_vector": {"layers.0": ROW, "layers.1": ROW * 0},
    "mixed_widths": {"layers.0": ROW, "layers.1": torch.ones(5)},
    "duplicate_layer": {"layers.1": ROW, "layer_1": ROW},
    "unknown_layout": {"layers.0": ROW, "lm_head": ROW},
    "unknown_layout ": {"a": ROW, "b": ROW},
    "unknown_layout  ": {"W_dec": torch.ones(4, 4), "W_enc": torch.ones(4, 4)},
    "invalid_file": {"layers.0": torch.ones(2, 4)},
    "invalid_file ": {"layers.0": torch.ones(4, dtype=torch.int32)},
    "invalid_file  ": {"layers.0": torch.ones(())},
    "invalid_file   ": {"layers.0": torch.ones(0)},
    "invalid_file    ": {"x": torch.ones(2, 2, 2)},
    "invalid_file     ": {
        "layers.0.rotation": torch.ones(2, 4),
        "layers.0.weight": torch.ones(2, 5),
        "layers.0.bias": torch.ones(2),
    },
}


@pytest.mark.parametrize("code", WRONG_TENSORS)
def test_tensors_that_make_no_artefact(tmp_path: Path, code: str) -> None:
    path = written(tmp_path, WRONG_TENSORS[code])
    assert refused(path, ImportOptions(layers=(0,))).code == code.strip()


def test_a_layer_before_the_first(tmp_path: Path) -> None:
    error = refused(written(tmp_path, {"layers.0": ROW}), ImportOptions(layer_offset=-1))
    assert (error.code, error.param) == ("invalid_layer_offset", "/layer_offset")


def test_an_offset_does_not_overrule_a_card(tmp_path: Path) -> None:
    path = tmp_path / "v"
    path.write_bytes(ControlVector.of({1: ROW}).to_bytes())
    assert refused(path, ImportOptions(layer_offset=1)).param == "/layer_offset"


GOOD_CARD = Card(width=4, layers=(0,)).model_dump(mode="json", by_alias=True)
WRONG_CARDS = [
    "{",
    "[]",
    "[" * 100_000,
    "{}",
    json.dumps({**GOOD_CARD, "width": 5}),
    json.dumps({**GOOD_CARD, "layers": [1]}),
    json.dumps({**GOOD_CARD, "layers": [0, 1]}),
    json.dumps({**GOOD_CARD, "default_layers": [1]}),
    json.dumps({**GOOD_CARD, "default_strength": float("nan")}),
    json.dumps({**GOOD_CARD, "site": "nowhere"}),
    json.dumps({**GOOD_CARD, "surprise": 1}),
    json.dumps({**GOOD_CARD, "kind": "sae"}),
    json.dumps({**GOOD_CARD, "kind": "low_rank"}),
    json.dumps({"architecture": "standard", "card": GOOD_CARD}),
]


@pytest.mark.parametrize("text", WRONG_CARDS)
def test_cards_that_do_not_fit(tmp_path: Path, text: str) -> None:
    path = written(tmp_path, {"layers.0": ROW}, steer=text)
    assert isinstance(refused(path), FileFormatError)


def test_the_name_on_a_card_is_not_believed(tmp_path: Path) -> None:
    text = json.dumps({**GOOD_CARD, "name": "../evil"})
    assert read(written(tmp_path, {"layers.0": ROW}, steer=text)).card.name == ""


def raw(header: bytes, data: bytes = b"", declared: int | None = None) -> bytes:
    return (len(header) if declared is None else declared).to_bytes(8, "little") + header + data


GOOD_FILE = save({"layers.0": ROW})
TWICE = (
    b'{"layers.0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},'
    b'"layers.0":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
)
LYING = {
    "empty_file": b"",
    "truncated_file": raw(b"{" + b" " * 9, declared=2**63),
    "truncated_file ": raw(b"{", declared=100 << 20),
    "truncated_file  ": GOOD_FILE[:20],
    "header_too_large": raw(b"{" + b" " * ((16 << 20) + 1)),
    "invalid_file": raw(b'{"a":' + b"[" * 200_000),
    "invalid_file ": raw(b"{}x"),
    "invalid_file  ": raw(TWICE, b"\0\0\x80\x3f"),
    "invalid_file   ": GOOD_FILE[:-1],
    "invalid_file    ": GOOD_FILE + b"\0",
    "invalid_file     ": raw(
        b'{"layers.0":{"dtype":"F32","shape":[4611686018427387904,4],"data_offsets":[0,16]}}',
        b"\0" * 16,
    ),
    "unknown_layout": raw(b"{}"),
    "pickle_refused": pickle.dumps({"layers.0": [1.0]}),
    "unknown_format": b"hello, this is a text file",
    "invalid_file      ": b"\x93NUMPY\x01\x00" + b" " * 20,
    "invalid_json": b"{",
}


@pytest.mark.parametrize("code", LYING)
def test_files_that_lie(tmp_path: Path, code: str) -> None:
    path = tmp_path / "vector.safetensors"
    path.write_bytes(LYING[code])
    tracemalloc.start()
    try:
        error = refused(path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert isinstance(error, FileFormatError)
    assert error.code == code.strip()
    assert peak < 8 << 20


def test_a_torch_file_renamed_is_known_for_what_it_is(tmp_path: Path) -> None:
    path = tmp_path / "vector.safetensors"
    torch.save({"layers.0": ROW}, path)
    assert torch.equal(read(path)[0], ROW)
    torch.save({"layers.0": ROW}, path, _use_new_zipfile_serialization=False)
    error = refused(path)
    assert error.code == "pickle_refused"
    assert "safetensors.torch.save_file" in error.message


@given(st.data())
def test_damaged_files_are_refused_or_read_but_never_crash(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    good = bytearray(ControlVector.of({0: ROW, 3: ROW}, description="d").to_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        good[data.draw(st.integers(0, len(good) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(good)))
    path = tmp_path_factory.mktemp("damaged") / "v"
    path.write_bytes(good[:cut] if data.draw(st.booleans()) else good)
    status = None
    try:
        vector = read(path)
        assert all(bool(row.isfinite().all()) for row in vector.directions.values())
        assert ControlVector.from_bytes(vector.to_bytes()).card == vector.card
    except SteerError as error:
        status = error.status
    assert status is None or 400 <= status < 500
