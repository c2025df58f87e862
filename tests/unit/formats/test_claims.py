"""What files say beside their rows, whatever their format: honoured, overruled, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer.errors import SteerError
from steer.formats.arrays import layer_beside
from steer.formats.claims import check_claims
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions

PLAIN = ImportOptions()
ROWS = {"1": torch.ones(4), "3": torch.full((4,), 2.0)}


def safetensors(path: Path, about: dict[str, Any]) -> None:
    texts = {
        key: value if isinstance(value, str) else json.dumps(value) for key, value in about.items()
    }
    save_file(ROWS, path, metadata={"format": "pt", **texts})


def torch_file(path: Path, about: dict[str, Any]) -> None:
    torch.save({**ROWS, **about}, path)


def wrapped(path: Path, about: dict[str, Any]) -> None:
    torch.save({"state_dict": ROWS, **about}, path)


def svec(path: Path, about: dict[str, Any]) -> None:
    rows = {layer: row.tolist() for layer, row in ROWS.items()}
    path.write_text(json.dumps({"model_type": "llama", "directions": rows, **about}))


WRITERS: dict[str, Callable[[Path, dict[str, Any]], None]] = {
    "safetensors": safetensors,
    "torch": torch_file,
    "torch wrapped": wrapped,
    "svec": svec,
}
CHANGING: list[dict[str, Any]] = [
    {"mode": "project"},
    {"operation": "ablation"},
    {"interventionType": "mean_ablation"},
    {"hook_point": "attn_pattern"},
    {"scale": 0.5},
    {"alpha": 4.0},
    {"normalize": True},
    {"direction_signs": [-1, 1]},
    {"layer_offset": 1},
]


def read(path: Path, options: ImportOptions = PLAIN) -> Any:
    return read_artefact(path, options, scratch=None, unpacked_limit=0)


@pytest.mark.parametrize("about", CHANGING, ids=lambda about: next(iter(about)))
@pytest.mark.parametrize("format", WRITERS)
def test_what_would_change_the_meaning_is_refused_by_name(
    tmp_path: Path, format: str, about: dict[str, Any]
) -> None:
    WRITERS[format](tmp_path / "v", about)
    with pytest.raises(SteerError) as raised:
        read(tmp_path / "v")
    assert raised.value.code == "unhonoured_metadata"
    assert next(iter(about)) in raised.value.message


@pytest.mark.parametrize("format", WRITERS)
def test_what_is_no_different_or_only_described_is_read(tmp_path: Path, format: str) -> None:
    about = {"mode": "add", "scale": 1, "normalize": False, "note": "x", "model_name": "m"}
    WRITERS[format](tmp_path / "v", about)
    vector = read(tmp_path / "v")
    assert list(vector.directions) == [1, 3]


@pytest.mark.parametrize("format", WRITERS)
@pytest.mark.parametrize(
    ("said", "site"),
    [
        ("blocks.3.hook_resid_pre", "resid_pre"),
        ("block_input", "resid_pre"),
        ("mlp_output", "mlp_out"),
        ("residual_stream_post_layer", "resid_post"),
    ],
)
def test_a_site_that_is_understood_is_honoured(
    tmp_path: Path, format: str, said: str, site: str
) -> None:
    WRITERS[format](tmp_path / "v", {"hook_name": said})
    assert read(tmp_path / "v").card.site == site
    chosen = read(tmp_path / "v", ImportOptions(site="attn_out"))
    assert chosen.card.site == "attn_out"


@pytest.mark.parametrize(
    ("about", "options"),
    [
        ({"hook": "odd"}, ImportOptions(site="mlp_out")),
        ({"scale": 2}, ImportOptions(strength=2.0)),
        ({"offset": 1}, ImportOptions(layer_offset=-1)),
    ],
)
def test_the_advice_of_the_refusal_is_taken(about: dict[str, Any], options: ImportOptions) -> None:
    with pytest.raises(SteerError):
        check_claims(about, PLAIN)
    check_claims(about, options)


@pytest.mark.parametrize("key", ["mode", "scale", "hook"])
def test_what_nests_without_end_is_refused(key: str) -> None:
    deep: Any = []
    for _ in range(100_000):
        deep = [deep]
    for about in ({key: deep}, {"more": {key: deep}}, {"more": {key: {"x": deep}}}):
        with pytest.raises(SteerError) as raised:
            check_claims(about, PLAIN)
        assert raised.value.code == "unhonoured_metadata"
    with pytest.raises(SteerError, match="layer"):
        layer_beside({"layer": deep})
