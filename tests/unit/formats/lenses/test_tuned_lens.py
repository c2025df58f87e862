"""Folders of the tuned-lens package, and lenses in files of our own."""

import json
import tarfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer.artefacts.lens import Lens
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.formats.placement import file_hash
from steer.registry.registry import Registry

PLAIN = ImportOptions()
LAYERS, WIDTH = 3, 4
CONFIG = {
    "base_model_name_or_path": "some/model",
    "d_model": WIDTH,
    "num_hidden_layers": LAYERS,
    "bias": True,
    "base_model_revision": "main",
    "unembed_hash": "abc",
    "lens_type": "linear_tuned_lens",
}


def translators(bias: bool = True, dtype: torch.dtype = torch.float32) -> torch.nn.ModuleList:
    torch.manual_seed(1)
    made = [torch.nn.Linear(WIDTH, WIDTH, bias=bias, dtype=dtype) for _ in range(LAYERS)]
    return torch.nn.ModuleList(made)


def folder(path: Path, config: Any = CONFIG, parameters: Any = None) -> Path:
    """As `TunedLens.save` writes: the state_dict of its ModuleList, and the config."""
    path.mkdir(exist_ok=True)
    torch.save(translators().state_dict() if parameters is None else parameters, path / "params.pt")
    (path / "config.json").write_text(json.dumps(config))
    return path


def read(path: Path, options: ImportOptions = PLAIN, scratch: Path | None = None) -> Any:
    return read_artefact(path, options, scratch=scratch, unpacked_limit=1 << 20)


def test_translators_and_what_is_recorded(tmp_path: Path) -> None:
    lens = read(folder(tmp_path / "lens"))
    assert isinstance(lens, Lens)
    for layer, module in enumerate(translators()):
        weight, bias = lens.translators[layer]
        assert torch.equal(weight, module.weight)
        assert torch.equal(bias, module.bias)
    card = lens.card
    assert (card.kind, card.site, card.layers, card.width) == (
        "lens",
        "resid_pre",
        (0, 1, 2),
        WIDTH,
    )
    assert card.model == "some/model"
    assert card.provenance["tool"] == "tuned-lens"
    assert card.provenance["unembed_hash"] == "abc"
    assert card.provenance["file_sha256"] == file_hash(tmp_path / "lens" / "params.pt")
    with tarfile.open(tmp_path / "lens.tar", "w") as file:
        file.add(tmp_path / "lens", "lens")
    assert read(tmp_path / "lens.tar", scratch=tmp_path / "s").sha256 == lens.sha256


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_our_own_file_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    lens = read(folder(tmp_path / "lens", parameters=translators(dtype=dtype).state_dict()))
    (tmp_path / "file").write_bytes(lens.to_bytes())
    back = read(tmp_path / "file")
    assert back.card == lens.card
    assert back.sha256 == lens.sha256
    assert back.translators[1][0].dtype == dtype
    assert Lens.from_bytes(lens.to_bytes()).sha256 == lens.sha256


def test_a_lens_without_biases(tmp_path: Path) -> None:
    lens = read(folder(tmp_path / "lens", parameters=translators(bias=False).state_dict()))
    assert not lens.translators[2][1].any()


def test_the_registry_keeps_lenses(tmp_path: Path) -> None:
    with Registry.open(tmp_path / "registry") as registry:
        entry, created = registry.import_file(folder(tmp_path / "lens"), name="tuned")
        assert (entry.kind, created) == ("lens", True)
        assert registry.lens("tuned").sha256 == entry.sha256
        assert registry.lens("tuned").card.name == "tuned"
        with pytest.raises(SteerError) as raised:
            registry.lens("other")
        assert raised.value.code == "unknown_lens"
        with registry.content("lens", "tuned") as stream:
            (tmp_path / "copy").write_bytes(stream.read())
        again, created = registry.import_file(tmp_path / "copy", kind="lens", name="tuned")
        assert (again.id, created) == (entry.id, False)


def less(parameters: dict[str, Any], *gone: str) -> dict[str, Any]:
    return {key: value for key, value in parameters.items() if key not in gone}


GOOD = translators().state_dict()
WRONG: dict[str, tuple[str, Any, Any]] = {
    "another width": ("invalid_card", {**CONFIG, "d_model": 5}, GOOD),
    "another depth": ("invalid_card", {**CONFIG, "num_hidden_layers": 12}, GOOD),
    "another lens": ("unknown_layout", {**CONFIG, "lens_type": "mlp"}, GOOD),
    "a gap": ("unknown_layout", CONFIG, less(GOOD, "1.weight", "1.bias")),
    "a lone bias": ("unknown_layout", CONFIG, less(GOOD, "1.weight")),
    "another key": ("unknown_layout", CONFIG, {**GOOD, "input.weight": torch.ones(4, 4)}),
    "not square": ("invalid_file", CONFIG, {**GOOD, "1.weight": torch.ones(4, 3)}),
    "not finite": ("not_finite", CONFIG, {**GOOD, "1.bias": torch.full((4,), torch.nan)}),
    "a list": ("unknown_layout", CONFIG, [torch.ones(4, 4)]),
    "no object": ("invalid_file", [1], GOOD),
}


@pytest.mark.parametrize("what", WRONG)
def test_folders_that_are_no_lens(tmp_path: Path, what: str) -> None:
    code, config, parameters = WRONG[what]
    with pytest.raises(SteerError) as raised:
        read(folder(tmp_path / "lens", config, parameters))
    assert raised.value.code == code


def test_a_file_with_a_lens_card_and_other_tensors(tmp_path: Path) -> None:
    lens = read(folder(tmp_path / "lens"))
    card = lens.card.model_dump_json(by_alias=True, exclude={"name"})
    save_file({"layers.0.weight": torch.ones(4, 4)}, tmp_path / "f", metadata={"steer": card})
    with pytest.raises(SteerError, match=r"layers\.N\.bias"):
        read(tmp_path / "f")
