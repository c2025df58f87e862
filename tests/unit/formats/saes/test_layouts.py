"""Every published layout: read to the function that its own definition says, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from foreign.sae_layouts import LAYER, D, F, Layout, draw, layouts, pt
from safetensors.torch import load, save

from steer.artefacts.sae import SAE
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions
from steer.registry.registry import Registry

EVERY = layouts()


def write(layout: Layout, root: Path) -> Path:
    """The path to import: a folder, or the one file in it."""
    folder = root / layout.folder
    for name, data in layout.files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)
    return folder / next(iter(layout.files)) if layout.is_file else folder


def read(path: Path, options: ImportOptions | None = None) -> SAE:
    sae = read_artefact(path, options or ImportOptions(), scratch=None, unpacked_limit=1 << 20)
    assert isinstance(sae, SAE)
    return sae


@pytest.fixture(params=EVERY, ids=lambda one: one.name)
def layout(request) -> Layout:
    return request.param


def test_it_is_the_function_that_it_was_trained_as(layout, tmp_path):
    x = draw(20, 50, D)
    exact = layout.encode(x)

    sae = read(write(layout, tmp_path), layout.options)

    assert 0.02 < (exact != 0).double().mean() < 0.9
    for one in (sae, SAE.from_bytes(sae.to_bytes())):
        torch.testing.assert_close(one.encode(x).double(), exact, atol=1e-5, rtol=1e-5)
        decoded = one.decode(one.encode(x), x).double()
        torch.testing.assert_close(decoded, layout.decode(exact, x), atol=1e-5, rtol=1e-5)
    assert (sae.architecture, sae.d_sae, sae.layer) == (layout.architecture, F, LAYER)
    assert (sae.site, sae.write_point) == (layout.site, (LAYER, layout.write_site))
    assert len(sae.card.provenance["file_sha256"]) == 64


def test_it_is_registered_and_loaded_as_it_was_read(layout, tmp_path):
    path = write(layout, tmp_path)
    x = draw(21, 5, D)
    with Registry.open(tmp_path / "registry") as registry:
        entry, _ = registry.import_file(path, name="one", kind="sae", options=layout.options)
        loaded = registry.sae("one")
    assert loaded.sha256 == entry.sha256 == read(path, layout.options).sha256
    assert torch.equal(loaded.encode(x), read(path, layout.options).encode(x))


def test_a_damaged_file_is_refused(layout, tmp_path):
    path = write(layout, tmp_path)
    folder = path.parent if layout.is_file else path
    weights = max(layout.files, key=lambda name: len(layout.files[name]))
    data = layout.files[weights]
    for cut in (len(data) // 3, len(data) - 9):
        (folder / weights).write_bytes(data[:cut])
        with pytest.raises(SteerError) as caught:
            read(path, layout.options)
        assert 400 <= caught.value.status < 500


def test_numbers_that_are_none_are_refused(layout, tmp_path):
    # NaN over the encoder's last row, wherever it lies: found by its bytes.
    path = write(layout, tmp_path)
    folder = path.parent if layout.is_file else path
    weights = max(layout.files, key=lambda name: len(layout.files[name]))
    data = layout.files[weights]
    number = draw(2, F, D).div(3)[1, 1].numpy().tobytes()
    place = data.index(number)
    nan = torch.tensor(float("nan")).numpy().tobytes()
    (folder / weights).write_bytes(data[:place] + nan + data[place + 4 :])
    with pytest.raises(SteerError) as caught:
        read(path, layout.options)
    assert caught.value.code in ("not_finite", "invalid_file")


SAFETENSORS = [one for one in EVERY if any("safetensors" in name for name in one.files)]


@pytest.mark.parametrize("layout", SAFETENSORS, ids=lambda one: one.name)
@pytest.mark.parametrize("fault", ["an array more", "a wider decoder", "whole numbers"])
def test_arrays_that_do_not_belong_together_are_refused(layout, tmp_path, fault):
    path = write(layout, tmp_path)
    folder = path.parent if layout.is_file else path
    (weights,) = [name for name in layout.files if "safetensors" in name]
    arrays = load(layout.files[weights])
    decoder = next(name for name in arrays if name.lower() in DECODERS)
    if fault == "an array more":
        arrays["pre_bias"] = torch.zeros(D)
    elif fault == "a wider decoder":
        arrays[decoder] = torch.zeros([length + 1 for length in arrays[decoder].shape])
    else:
        arrays[decoder] = arrays[decoder].to(torch.int32)
    (folder / weights).write_bytes(save(arrays))
    with pytest.raises(SteerError) as caught:
        read(path, layout.options)
    assert caught.value.code in ("unknown_layout", "mixed_widths", "invalid_file")
    if fault == "an array more":
        assert "'pre_bias'" in str(caught.value)


DECODERS = ("w_dec", "decoder.weight", "w_d")


def by_name(name: str) -> Layout:
    return next(one for one in EVERY if one.name == name)


@pytest.mark.parametrize(
    ("name", "options", "code"),
    [
        ("Goodfire", ImportOptions(), "layer_required"),
        ("Goodfire", ImportOptions(layers=(1, 2)), "layer_required"),
        ("OpenAI v4", ImportOptions(layers=(1,)), "site_required"),
        ("Gemma Scope 1 npz, lower case", ImportOptions(), "layer_required"),
    ],
)
def test_what_the_file_does_not_say_is_asked_for(tmp_path, name, options, code):
    with pytest.raises(SteerError) as caught:
        read(write(by_name(name), tmp_path), options)
    assert caught.value.code == code


def test_the_k_of_qwen_scope_is_asked_for(tmp_path):
    layout = by_name("Qwen Scope")
    (tmp_path / "file.pt").write_bytes(next(iter(layout.files.values())))
    with pytest.raises(SteerError, match="L0_50") as caught:
        read(tmp_path / "file.pt", layout.options)
    assert caught.value.code == "k_required"
    origin = ImportOptions(layers=(LAYER,), origin="hf://Qwen/SAE-Res-W32K-L0_7/layer3.sae.pt")
    assert read(tmp_path / "file.pt", origin).k == 7


CONFIG_FAULTS = [
    ("sparsify topk", "cfg.json", {"signed": True}, "unsupported_architecture", "signed"),
    ("sparsify topk", "cfg.json", {"activation": "gelu"}, "unsupported_architecture", "gelu"),
    ("sparsify topk", "cfg.json", {"k": 0}, "invalid_file", "got 0"),
    ("sparsify topk", "cfg.json", {"k": 25}, "invalid_file", "from 1 to 24"),
    ("sparsify topk", "cfg.json", {"d_in": 9}, "mixed_widths", "d_in = 9"),
    ("sparsify topk", "cfg.json", {"num_latents": 5}, "mixed_widths", "num_latents = 5"),
    ("sparsify groupmax", "cfg.json", {"k": 7}, "invalid_file", "7 groups"),
    ("Gemma Scope 2 resid_post", "config.json", {"architecture": "clt"}, None, "clt"),
    ("Gemma Scope 2 resid_post", "config.json", {"hf_hook_point_in": "x"}, None, "'x'"),
    ("Gemma Scope 2 resid_post", "config.json", {"affine_connection": True}, None, "lacks"),
    ("Gemma Scope 2 transcoder", "config.json", {"affine_connection": False}, None, "holds"),
    ("Llama Scope", "hyperparams.json", {"jump_relu_threshold": -1}, None, "got -1"),
    ("Llama Scope", "hyperparams.json", {"act_fn": "topk"}, None, "topk"),
    ("Llama Scope", "hyperparams.json", {"use_glu_encoder": True}, None, "gated linear"),
    (
        "Llama Scope",
        "hyperparams.json",
        {"dataset_average_activation_norm": 3},
        None,
        "'in' and 'out'",
    ),
    ("Llama Scope R1", "config.json", {"act_fn": "tanh"}, None, "tanh"),
    ("Llama Scope R1", "config.json", {"hook_point_in": "h"}, None, "'h'"),
]


@pytest.mark.parametrize(("name", "file", "change", "code", "message"), CONFIG_FAULTS)
def test_a_configuration_that_cannot_be_served_is_refused(
    tmp_path, name, file, change, code, message
):
    layout = by_name(name)
    path = write(layout, tmp_path)
    (path / file).write_text(json.dumps(json.loads(layout.files[file]) | change))
    with pytest.raises(SteerError, match=message) as caught:
        read(path, layout.options)
    assert code in (None, caught.value.code)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"dict_class": "CrossCoder"}, "CrossCoder"),
        ({"layer": "3"}, "layer '3'"),
        ({"submodule_name": "lm_head"}, "lm_head"),
        ({"k": 4}, "k = 4"),
        ({"dict_size": 23}, "dict_size = 23"),
    ],
)
def test_a_trainer_that_does_not_fit_is_refused(tmp_path, change, message):
    layout = by_name("dictionary_learning AutoEncoderTopK")
    path = write(layout, tmp_path)
    config = json.loads(layout.files["config.json"])
    config["trainer"] |= change
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(SteerError, match=message):
        read(path, layout.options)


def test_the_weights_of_two_layouts_in_one_folder_are_refused(tmp_path):
    path = write(by_name("sparsify topk"), tmp_path)
    (path / "sae_weights.safetensors").write_bytes(save({"W_enc": torch.zeros(2, 2)}))
    with pytest.raises(SteerError, match="2 layouts"):
        read(path)


def test_the_arrays_of_two_layouts_in_one_file_are_refused(tmp_path):
    arrays = {"encoder_linear.weight": torch.zeros(2, 2), "decoder_linear.weight": torch.eye(2)}
    (tmp_path / "f.pt").write_bytes(pt(arrays | {"W_enc": torch.eye(2), "W_dec": torch.eye(2)}))
    with pytest.raises(SteerError, match="two layouts"):
        read(tmp_path / "f.pt", ImportOptions(layers=(1,)))


@pytest.mark.parametrize(
    "arrays",
    [
        {"W_enc_3": torch.zeros(F, D), "b_enc_3": torch.zeros(F)},
        {"W_dec_3": torch.zeros(F, 2, D)},
        {"W_enc": torch.zeros(F, D), "W_dec": torch.zeros(F, 2, D)},
    ],
)
def test_cross_layer_transcoders_are_refused_by_name(tmp_path, arrays):
    (tmp_path / "f.safetensors").write_bytes(save(arrays))
    with pytest.raises(SteerError, match="cross-layer transcoder") as caught:
        read(tmp_path / "f.safetensors", ImportOptions(layers=(1,)))
    assert caught.value.code == "unsupported_architecture"


def test_temporal_saes_are_refused_by_name(tmp_path):
    (tmp_path / "conf.yaml").write_text("sae: {}\n")
    (tmp_path / "latest_ckpt.safetensors").write_bytes(save({"D": torch.zeros(2, 2)}))
    with pytest.raises(SteerError, match="temporal SAE"):
        read(tmp_path)
