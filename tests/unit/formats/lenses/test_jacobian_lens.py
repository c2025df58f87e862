"""Jacobian lenses as the method's own code saves them, finished and not."""

from __future__ import annotations

import io
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from steer.artefacts.lens import Lens
from steer.errors import FileFormatError, SteerError
from steer.formats.importing import check_model, read_artefact
from steer.formats.options import ImportOptions
from steer.model import ModelInfo
from steer.registry.registry import Registry

PLAIN = ImportOptions()
WIDTH, LAYERS = 4, 3


def matrices(dtype: torch.dtype = torch.float16, layers: int = LAYERS) -> dict[int, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return {n: torch.randn(WIDTH, WIDTH, generator=generator).to(dtype) for n in range(layers)}


def published(**changed: Any) -> dict[str, Any]:
    """What `JacobianLens.save` writes."""
    held = {"J": matrices(), "n_prompts": 100, "source_layers": [0, 1, 2], "d_model": WIDTH}
    return {key: value for key, value in {**held, **changed}.items() if value is not ...}


def checkpoint(**changed: Any) -> dict[str, Any]:
    """What a fit writes while it goes on."""
    held = {
        "jacobian_sum": matrices(torch.float32),
        "n_done": 8,
        "next_idx": 9,
        "source_layers": [0, 1, 2],
        "target_layer": -1,
        "skip_first": 16,
    }
    return {key: value for key, value in {**held, **changed}.items() if value is not ...}


def read(path: Path, held: Any, options: ImportOptions = PLAIN) -> Lens:
    torch.save(held, path)
    found = read_artefact(path, options, scratch=None, unpacked_limit=0)
    assert isinstance(found, Lens)
    return found


def test_a_published_lens_reads_the_outputs_of_its_layers(tmp_path: Path) -> None:
    lens = read(tmp_path / "m.pt", published())
    x = torch.randn(5, WIDTH)
    for layer, matrix in matrices().items():
        assert lens.translators[layer + 1].weight.dtype == torch.float16
        expected = x.double() @ matrix.double().T
        got = lens.translated(x, layer, "resid_post").double()
        torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(lens.translated(x, layer + 1, "resid_pre").double(), got)
    assert torch.equal(lens.translated(x, LAYERS, "resid_post"), x)
    card = lens.card
    assert (card.kind, card.site, card.layers, card.width) == ("lens", "resid_pre", (1, 2, 3), 4)
    assert (lens.method, lens.blocks, lens.output_layers) == ("jacobian", 4, [0, 1, 2])
    made = card.provenance
    assert (made["method"], made["prompts"]) == ("jacobian-lens", 100)
    assert made["layer_names"] == {"1": "J[0]", "2": "J[1]", "3": "J[2]"}


def test_a_file_put_together_byte_by_byte(tmp_path: Path) -> None:
    """One layer of width 2, J = [[1, 2], [3, 4]] as fp16: no torch wrote it."""
    program = b"".join(
        (
            b"\x80\x02}(",
            b"X\x01\x00\x00\x00J}K\x00ctorch._utils\n_rebuild_tensor_v2\n((",
            b"X\x07\x00\x00\x00storagectorch\nHalfStorage\n",
            b"X\x01\x00\x00\x000X\x03\x00\x00\x00cpuK\x04tQK\x00K\x02K\x02\x86K\x02K\x01\x86\x89",
            b"ccollections\nOrderedDict\n)RtRs",
            b"X\x09\x00\x00\x00n_promptsK\x07",
            b"X\x0d\x00\x00\x00source_layers]K\x00a",
            b"X\x07\x00\x00\x00d_modelK\x02u.",
        )
    )
    numbers = bytes.fromhex("003c 0040 0042 0044")
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        for name, data in (("data.pkl", program), ("data/0", numbers), ("version", b"3\n")):
            file.writestr(f"m/{name}", data)
    lens = read_artefact(tmp_path / "m.pt", PLAIN, scratch=None, unpacked_limit=0)
    assert isinstance(lens, Lens)
    assert lens.translators[1].weight.tolist() == [[1.0, 2.0], [3.0, 4.0]]
    assert lens.card.provenance["prompts"] == 7


def test_a_checkpoint_is_the_mean_of_its_sum(tmp_path: Path) -> None:
    lens = read(tmp_path / "c.pt", checkpoint())
    for layer, total in matrices(torch.float32).items():
        assert torch.equal(lens.translators[layer + 1].weight, total / 8)
    made = lens.card.provenance
    assert (made["prompts"], made["skip_first"], made["next_idx"]) == (8, 16, 9)


def test_layers_may_be_missing_before_the_last(tmp_path: Path) -> None:
    few = {n: matrix for n, matrix in matrices().items() if n != 1}
    lens = read(tmp_path / "m.pt", published(J=few, source_layers=[2, 0]))
    assert lens.output_layers == [0, 2]
    with pytest.raises(SteerError) as raised:
        lens.translated(torch.ones(1, WIDTH), 1, "resid_post")
    assert (raised.value.code, raised.value.param) == ("layer_not_in_lens", "/layers")
    assert "[0, 2]" in str(raised.value)


def test_the_last_blocks_identity_is_not_kept(tmp_path: Path) -> None:
    held = {**matrices(), LAYERS: torch.eye(WIDTH).half()}
    lens = read(tmp_path / "m.pt", published(J=held, source_layers=[0, 1, 2, 3]))
    assert lens.blocks == LAYERS + 1


def test_a_folder_names_the_model(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "Qwen3-4B_jacobian_lens_n1000.pt")
    found = read_artefact(tmp_path, PLAIN, scratch=None, unpacked_limit=0)
    assert found.card.model is None
    (tmp_path / "config.yaml").write_text("model:\n  hf_model_name: Qwen/Qwen3-4B\nseed: 0\n")
    found = read_artefact(tmp_path, PLAIN, scratch=None, unpacked_limit=0)
    assert found.card.model == "Qwen/Qwen3-4B"
    (tmp_path / "config.yaml").write_text("[: not yaml")
    with pytest.raises(SteerError, match=r"config\.yaml is not YAML"):
        read_artefact(tmp_path, PLAIN, scratch=None, unpacked_limit=0)
    (tmp_path / "config.yaml").unlink()
    torch.save(published(), tmp_path / "other_jacobian_lens.pt")
    with pytest.raises(SteerError, match="several Jacobian lenses"):
        read_artefact(tmp_path, PLAIN, scratch=None, unpacked_limit=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_our_own_file_comes_back_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    lens = read(tmp_path / "m.pt", published(J=matrices(dtype)))
    (tmp_path / "file").write_bytes(lens.to_bytes())
    back = read_artefact(tmp_path / "file", PLAIN, scratch=None, unpacked_limit=0)
    assert (back.sha256, back.card) == (lens.sha256, lens.card)
    assert Lens.from_bytes(lens.to_bytes()).sha256 == lens.sha256
    assert Lens.from_bytes(lens.to_bytes()).method == "jacobian"


def test_the_registry_keeps_them_beside_tuned_ones(tmp_path: Path) -> None:
    torch.save(published(), tmp_path / "m.pt")
    with Registry.open(tmp_path / "registry") as registry:
        entry, _ = registry.import_file(tmp_path / "m.pt", name="reader")
        assert entry.kind == "lens"
        assert registry.lens("reader").sha256 == entry.sha256


def test_a_lens_belongs_to_models_of_its_depth() -> None:
    lens = Lens.of_jacobians({1: torch.eye(WIDTH) * 2, 3: torch.eye(WIDTH)})
    for blocks, fits in ((3, False), (4, True), (5, False)):
        model = ModelInfo("m", "llama", blocks, WIDTH, 10, 8)
        if fits:
            lens.check_fits(model)
            check_model(lens, model)
            continue
        with pytest.raises(SteerError, match="blocks"):
            lens.check_fits(model)
        with pytest.raises(SteerError) as raised:
            check_model(lens, model)
        assert raised.value.code == "layer_out_of_range"


def test_a_lens_of_some_layers_says_its_models_depth(tmp_path: Path) -> None:
    lens = Lens.of_jacobians({2: torch.eye(WIDTH) * 2}, depth=5)
    (tmp_path / "file").write_bytes(lens.to_bytes())
    back = read_artefact(tmp_path / "file", PLAIN, scratch=None, unpacked_limit=0)
    assert isinstance(back, Lens)
    assert (back.sha256, back.blocks, back.output_layers) == (lens.sha256, 5, [1])
    for blocks in (3, 4, 6):
        model = ModelInfo("m", "llama", blocks, WIDTH, 10, 8)
        with pytest.raises(SteerError, match="blocks"):
            back.check_fits(model)
        with pytest.raises(SteerError, match="for a model of 5 layers"):
            check_model(back, model)
    fitting = ModelInfo("m", "llama", 5, WIDTH, 10, 8)
    back.check_fits(fitting)
    check_model(back, fitting)
    assert not back.translates(4, "resid_post")


def test_a_depth_that_the_maps_contradict(tmp_path: Path) -> None:
    with pytest.raises(FileFormatError, match="at least 3 blocks, not of 2"):
        Lens.of_jacobians({2: torch.eye(WIDTH)}, depth=2)
    for depth, maps in ((3, {2: torch.eye(WIDTH)}), (1, {2: torch.eye(WIDTH)})):
        whole = Lens.of_jacobians(maps)
        lying = Lens(whole.translators, whole.card.model_copy(update={"depth": depth}))
        (tmp_path / "file").write_bytes(lying.to_bytes())
        with pytest.raises(FileFormatError) as caught:
            read_artefact(tmp_path / "file", PLAIN, scratch=None, unpacked_limit=0)
        assert caught.value.code == "invalid_card"


MATRIX = matrices()[0]
WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "another width": ("invalid_card", published(d_model=5), "'d_model' says 5"),
    "layers it has not": ("invalid_card", published(source_layers=[0, 1]), "'source_layers'"),
    "layers that are no list": ("invalid_card", published(source_layers=3), "'source_layers'"),
    "no prompts": ("invalid_card", published(n_prompts=0), "'n_prompts' is 0"),
    "prompts not said": ("invalid_card", published(n_prompts=...), "'n_prompts' is None"),
    "prompts true": ("invalid_card", published(n_prompts=True), "'n_prompts'"),
    "nothing done": ("invalid_card", checkpoint(n_done=0), "'n_done' is 0"),
    "more than can be counted": ("invalid_card", checkpoint(n_done=10**400), "'n_done'"),
    "no layers": ("unknown_layout", published(J={}, source_layers=[]), "'J' holds no layer"),
    "a layer by name": ("unknown_layout", published(J={"a": MATRIX}), "no matrix of a layer"),
    "a layer below 0": ("unknown_layout", published(J={-1: MATRIX}), "no matrix of a layer"),
    "numbers": ("unknown_layout", published(J={0: 1.0}), "no matrix of a layer"),
    "not square": (
        "invalid_card",
        published(J={0: torch.ones(4, 3)}, source_layers=[0]),
        r"J\[0\] has the shape \[4, 3\]",
    ),
    "not square, no width": (
        "invalid_card",
        published(J={0: torch.ones(4, 3)}, source_layers=[0], d_model=...),
        "must be square",
    ),
    "a row": ("invalid_file", published(J={0: torch.ones(4)}), "dense matrix"),
    "whole numbers": (
        "invalid_file",
        published(J={0: torch.ones(4, 4, dtype=torch.int64)}),
        "float type",
    ),
    "not finite": (
        "not_finite",
        published(J={0: torch.full((4, 4), torch.nan)}, source_layers=[0]),
        "NaN",
    ),
    "another target": ("unhonoured_metadata", checkpoint(target_layer=1), "target_layer"),
    "normalised": ("unhonoured_metadata", published(normalized=True), "normalized"),
}


@pytest.mark.parametrize("what", WRONG)
def test_files_that_lie_are_refused_by_field(tmp_path: Path, what: str) -> None:
    code, held, why = WRONG[what]
    with pytest.raises(SteerError, match=why) as raised:
        read(tmp_path / "m.pt", held)
    assert raised.value.code == code


def test_storages_that_declare_too_much(tmp_path: Path) -> None:
    stream = io.BytesIO()
    torch.save(published(), stream)
    with zipfile.ZipFile(stream) as file:
        members = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(tmp_path / "m.pt", "w") as file:
        for name, data in members.items():
            file.writestr(name, data[:8] if name.endswith("data/0") else data)
    with pytest.raises(SteerError) as raised:
        read_artefact(tmp_path / "m.pt", PLAIN, scratch=None, unpacked_limit=0)
    assert raised.value.code == "truncated_file"


def test_layers_are_not_moved(tmp_path: Path) -> None:
    with pytest.raises(SteerError) as raised:
        read(tmp_path / "m.pt", published(), ImportOptions(layer_offset=1))
    assert raised.value.code == "invalid_option"


def test_one_file_has_one_kind_of_map(tmp_path: Path) -> None:
    lens = read(tmp_path / "m.pt", published())
    card = lens.card.model_dump_json(by_alias=True, exclude={"name"})
    tensors = {"layers.1.jacobian": torch.ones(4, 4), "layers.2.weight": torch.ones(4, 4)}
    save_file(tensors, tmp_path / "f", metadata={"steer": card})
    with pytest.raises(SteerError):
        read_artefact(tmp_path / "f", PLAIN, scratch=None, unpacked_limit=0)
