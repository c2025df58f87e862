"""Files that stand where another should be are called by their name, whatever they should hold."""

import shutil
import zipfile
from pathlib import Path

import pytest

from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 12345\n"
)
STANDING = {
    "a pointer": (POINTER, "lfs_pointer", "git lfs pull"),
    "a pointer of Windows": (POINTER.replace(b"\n", b"\r\n"), "lfs_pointer", "git lfs pull"),
    "a page": (b"<!DOCTYPE html>\n<html>Log in</html>", "web_page", "/resolve/"),
    "a page after a mark": (b"\xef\xbb\xbf\r\n<html><body>404", "web_page", "/resolve/"),
    "an XML error": (b'<?xml version="1.0"?><Error>AccessDenied', "web_page", "link"),
}
NAMES = ["v.gguf", "v.safetensors", "v.pt", "v.npz", "v.svec", "v.zip"]
FOLDERS = {
    "saelens": ("sae_weights.safetensors", {"cfg.json": b"{}"}),
    "saelens config": ("cfg.json", {"sae_weights.safetensors": b"x"}),
    "refusal": ("direction.pt", {"direction_metadata.json": b'{"layer": 1, "pos": -1}'}),
    "lens": ("params.pt", {"config.json": b"{}"}),
    "pyreft": (
        "intkey_layer_8_comp_block_output_unit_pos_nunit_1#0.bin",
        {"config.json": b"{}"},
    ),
}


def refused(path: Path, scratch: Path) -> SteerError:
    with pytest.raises(SteerError) as raised:
        read_artefact(path, ImportOptions(), scratch=scratch, unpacked_limit=1 << 20)
    return raised.value


@pytest.mark.parametrize("what", STANDING)
@pytest.mark.parametrize("name", NAMES)
def test_a_file(tmp_path: Path, name: str, what: str) -> None:
    data, code, remedy = STANDING[what]
    (tmp_path / name).write_bytes(data)
    error = refused(tmp_path / name, tmp_path / "scratch")
    assert error.code == code
    assert remedy in error.message


@pytest.mark.parametrize("what", FOLDERS)
def test_a_file_of_a_folder_is_named(tmp_path: Path, what: str) -> None:
    name, beside = FOLDERS[what]
    folder = tmp_path / "top"
    folder.mkdir()
    (folder / name).write_bytes(POINTER)
    for other, data in beside.items():
        (folder / other).write_bytes(data)
    error = refused(folder, tmp_path / "scratch")
    assert error.code == "lfs_pointer"
    assert repr(name) in error.message
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for path in folder.iterdir():
            file.write(path, f"top/{path.name}")
    shutil.rmtree(folder)
    assert refused(tmp_path / "a.zip", tmp_path / "scratch").code == "lfs_pointer"


@pytest.mark.parametrize("name", ["model-00001-of-00002.safetensors", "config.json"])
def test_a_model_folder_is_refused_before_it_is_loaded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(POINTER)
    (tmp_path / "README.md").write_bytes(b"<html>")
    with pytest.raises(SteerError, match=name) as raised:
        TransformersEngine.load(tmp_path)
    assert raised.value.code == "lfs_pointer"


def test_a_folder_with_a_peft_adapter_is_called_so(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    assert refused(tmp_path, tmp_path / "scratch").code == "model_weights"
