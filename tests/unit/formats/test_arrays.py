"""Names and shapes that people give their rows, the same in every file that holds arrays."""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from steer.errors import SteerError
from steer.formats.arrays import row_place
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions

PLAIN = ImportOptions()
WIDTH = 4
Tensors = Mapping[str, torch.Tensor]


def marked(*shape: int) -> torch.Tensor:
    """Rows of WIDTH numbers, each row its own number from 1 on, in the shape asked for."""
    count = int(np.prod(shape)) // WIDTH
    return torch.arange(1.0, count + 1).repeat_interleave(WIDTH).reshape(shape)


def npz(path: Path, arrays: Tensors) -> None:
    with path.open("wb") as stream:
        np.savez(stream, **{name: one.numpy() for name, one in arrays.items()})


def written_json(path: Path, arrays: Tensors) -> None:
    path.write_text(json.dumps({name: one.tolist() for name, one in arrays.items()}))


WRITERS: dict[str, Callable[[Path, Tensors], None]] = {
    "safetensors": lambda path, arrays: save_file(dict(arrays), path),
    "torch": lambda path, arrays: torch.save(dict(arrays), path),
    "npz": npz,
    "json": written_json,
}


def read(path: Path, options: ImportOptions = PLAIN) -> Any:
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


def refused(path: Path, options: ImportOptions = PLAIN) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read(path, options)
    assert 400 <= raised.value.status < 500
    return raised.value


NAMES = {
    "8": (8, None),
    "08": (8, None),
    "layer_8": (8, None),
    "layers.8": (8, None),
    "direction.8": (8, None),
    "model.layers.8": (8, None),
    "model.language_model.layers.8": (8, None),
    "transformer.h.8": (8, None),
    "model.layers.8.output": (8, "resid_post"),
    "model.layers.8.input": (8, "resid_pre"),
    "model.layers.8.mlp": (8, "mlp_out"),
    "model.layers.8.self_attn": (8, "attn_out"),
    "blocks.8.hook_resid_pre": (8, "resid_pre"),
    "blocks.8.hook_resid_post": (8, "resid_post"),
    "vector": None,
    "-1": None,
    "model.layers.8.mlp.down_proj.weight": None,
}


@pytest.mark.parametrize("name", NAMES)
def test_a_rows_name_says_its_layer_and_may_say_its_site(name: str) -> None:
    assert row_place(name) == NAMES[name]


@pytest.mark.parametrize("format", WRITERS)
def test_the_site_in_the_names_is_honoured(tmp_path: Path, format: str) -> None:
    rows = {f"blocks.{n}.hook_resid_pre": marked(WIDTH) * n for n in (1, 3)}
    WRITERS[format](tmp_path / "v", rows)
    vector = read(tmp_path / "v")
    assert (list(vector.directions), vector.card.site) == ([1, 3], "resid_pre")
    WRITERS[format](tmp_path / "w", {**rows, "blocks.2.hook_mlp_out": marked(WIDTH)})
    assert "several sites" in refused(tmp_path / "w").message


@pytest.mark.parametrize("shape", [(WIDTH,), (1, WIDTH), (WIDTH, 1), (1, 1, WIDTH)])
@pytest.mark.parametrize("format", WRITERS)
def test_a_row_may_have_lengths_of_one_beside_its_own(
    tmp_path: Path, format: str, shape: tuple[int, ...]
) -> None:
    WRITERS[format](tmp_path / "v", {"3": marked(*shape)})
    assert read(tmp_path / "v")[3].tolist() == [1.0] * WIDTH
    WRITERS[format](tmp_path / "w", {"mean": marked(*shape)})
    placed = read(tmp_path / "w", ImportOptions(layers=(3,), source="blocks"))
    assert placed[3].tolist() == [1.0] * WIDTH


@pytest.mark.parametrize("shape", [(3, WIDTH), (3, 1, WIDTH), (1, 3, WIDTH)])
@pytest.mark.parametrize("format", WRITERS)
def test_a_matrix_may_have_a_length_of_one_beside(
    tmp_path: Path, format: str, shape: tuple[int, ...]
) -> None:
    WRITERS[format](tmp_path / "v", {"mean": marked(*shape)})
    vector = read(tmp_path / "v", ImportOptions(source="hidden-states"))
    assert {n: float(row[0]) for n, row in vector.directions.items()} == {0: 2.0, 1: 3.0}


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize("beside", [{}, {"other": marked(WIDTH)}], ids=["alone", "beside"])
@pytest.mark.parametrize(
    "name",
    [
        "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight",
        "model.layers.0.mlp.down_proj.weight",
        "lm_head.weight",
    ],
)
def test_weights_are_refused_as_such(
    tmp_path: Path, format: str, name: str, beside: dict[str, torch.Tensor]
) -> None:
    WRITERS[format](tmp_path / "v", {name: marked(2, WIDTH), **beside})
    assert refused(tmp_path / "v", ImportOptions(source="blocks")).code == "model_weights"


def test_layers_from_the_models_end_are_refused_as_such(tmp_path: Path) -> None:
    torch.save({-1: marked(WIDTH), -2: marked(WIDTH)}, tmp_path / "v")
    assert "from the model's end" in refused(tmp_path / "v").message


WRAPPED: dict[str, Any] = {
    "under a name": {"state_dict": {"layers.1": marked(WIDTH), "layers.2": marked(WIDTH)}},
    "under two names": {"a": {"b": {1: marked(WIDTH), 2: marked(WIDTH)}}},
    "with words beside": {"directions": {1: marked(WIDTH), 2: marked(WIDTH)}, "model": "m"},
    "rows and words": {1: marked(WIDTH), 2: marked(1, WIDTH), "model": "m", "layer_count": 2},
}


@pytest.mark.parametrize("what", WRAPPED)
def test_rows_are_found_inside_of_dictionaries(tmp_path: Path, what: str) -> None:
    torch.save(WRAPPED[what], tmp_path / "v")
    assert list(read(tmp_path / "v").directions) == [1, 2]


@pytest.mark.parametrize("layer", [12, torch.tensor(12)])
def test_the_layer_beside_a_row_is_asked_about_and_kept(tmp_path: Path, layer: Any) -> None:
    torch.save({"vector": marked(WIDTH), "layer": layer}, tmp_path / "v")
    assert refused(tmp_path / "v").code == "site_required"
    vector = read(tmp_path / "v", ImportOptions(source="refusal-direction"))
    assert (list(vector.directions), vector.card.site) == ([12], "resid_pre")
    torch.save({"vector": marked(WIDTH), "layer": layer, "hook": "block_output"}, tmp_path / "w")
    assert read(tmp_path / "w").card.site == "resid_post"


LOST: dict[str, Any] = {
    "a list of layers": {"vectors": marked(2, WIDTH), "layers": [10, 20]},
    "rows and dictionaries": {1: marked(WIDTH), "more": {2: marked(WIDTH)}},
    "two dictionaries": {"a": {1: marked(WIDTH)}, "b": {1: marked(WIDTH)}},
    "a shadowed key": {"a": {1: marked(WIDTH), "mode": "add"}, "mode": "project"},
    "nothing": {"model": "m"},
}


@pytest.mark.parametrize("what", LOST)
def test_what_would_be_lost_is_refused(tmp_path: Path, what: str) -> None:
    torch.save(LOST[what], tmp_path / "v")
    refused(tmp_path / "v", ImportOptions(source="blocks"))


JSON: dict[str, tuple[Any, ImportOptions]] = {
    "a list of rows": (marked(3, WIDTH).tolist(), ImportOptions(source="blocks")),
    "one row": (marked(WIDTH).tolist(), ImportOptions(layers=(0,), source="blocks")),
    "a row with its layer": (
        {"vector": marked(WIDTH).tolist(), "layer": 0, "site": "resid_post"},
        PLAIN,
    ),
    "under a name": ({"layers": {"0": marked(WIDTH).tolist()}}, PLAIN),
}


@pytest.mark.parametrize("what", JSON)
@pytest.mark.parametrize("before", ["", "\ufeff", "\r\n "])
def test_json_lists_are_arrays(tmp_path: Path, what: str, before: str) -> None:
    held, options = JSON[what]
    text = before + json.dumps(held, indent=1).replace("\n", "\r\n")
    (tmp_path / "v").write_bytes(text.encode())
    vector = read(tmp_path / "v", options)
    assert vector[0].tolist() == [1.0] * WIDTH
    assert vector.card.provenance["format"] == "json"


@pytest.mark.parametrize(
    "held", [{"a": [[1, 2], [1]]}, [["x"]], [], {}, {"a": {}}, 5, [[[1.0]], 2]]
)
def test_json_that_holds_no_array_is_refused(tmp_path: Path, held: Any) -> None:
    (tmp_path / "v").write_text(json.dumps(held))
    refused(tmp_path / "v", ImportOptions(source="blocks", layers=(1,)))
