"""What lies in a model's folder is loaded, or refused for what it is."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import transformers
from shrunken import tiny
from tiny_models import build, tiny_tokenizer

from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and its tokenizer."""
    folder = tmp_path_factory.mktemp("llama")
    build("llama").save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


def _config(folder: Path, **fields: Any) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(fields))
    return folder


def _gguf(folder: Path) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(b"GGUF")
    return path


def _weights(folder: Path) -> Path:
    path = folder / "model.safetensors"
    path.write_bytes(b"")
    return path


def _adapter(folder: Path, **fields: Any) -> Path:
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", **fields}))
    return folder


def _quantised(folder: Path) -> Path:
    # bitsandbytes needs a package, and on most machines a GPU.
    method = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return _config(folder, model_type="llama", quantization_config=method)


def _own_code(folder: Path) -> Path:
    code = "raise AssertionError('code of the folder was run')"
    (folder / "modeling_own.py").write_text(code)
    (folder / "configuration_own.py").write_text(code)
    names = {"AutoConfig": "configuration_own.C", "AutoModelForCausalLM": "modeling_own.M"}
    return _config(folder, model_type="own", auto_map=names)


CASES: dict[str, tuple[Callable[[Path], Path], str, str]] = {
    "gguf": (_gguf, "model_not_loaded", "it is truncated"),
    "weights": (_weights, "model_not_loaded", "it is a file, and no GGUF: give the folder"),
    "adapter without its base": (
        lambda folder: _adapter(folder, base_model_name_or_path="org/base"),
        "model_not_loaded",
        "its base model 'org/base' is no folder here",
    ),
    "adapter of nothing": (_adapter, "model_not_loaded", "names no base model"),
    "quantised": (_quantised, "model_not_loaded", r"quantised \(bitsandbytes, 8 bit\)"),
    "own code": (_own_code, "model_not_loaded", "trust_remote_code"),
    "no generator": (
        lambda folder: _config(folder, model_type="clip"),
        "unsupported_model",
        "'clip' is not supported",
    ),
    "nothing": (lambda folder: folder, "model_not_loaded", "cannot be loaded"),
}


@pytest.mark.parametrize("kind", CASES)
def test_what_cannot_be_loaded_is_refused_for_what_it_is(kind: str, tmp_path: Path) -> None:
    make, code, says = CASES[kind]
    with pytest.raises(SteerError, match=says) as refusal:
        TransformersEngine.load(make(tmp_path), device="cpu")
    assert refusal.value.code == code


def test_an_adapter_is_merged_into_its_base(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By PEFT, which is no dependency: without it, what to do is said."""
    folder = _adapter(tmp_path, base_model_name_or_path=str(llama))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SteerError, match="install peft"):
        TransformersEngine.load(folder, device="cpu")
    merged = build("llama")

    class Wrapped:
        @classmethod
        def from_pretrained(cls, model: Any, path: str) -> Wrapped:
            assert (type(model).__name__, path) == ("LlamaForCausalLM", str(folder))
            return cls()

        def merge_and_unload(self) -> Any:
            return merged

    peft: Any = ModuleType("peft")
    peft.PeftModel = Wrapped
    monkeypatch.setitem(sys.modules, "peft", peft)
    engine = TransformersEngine.load(folder, device="cpu")
    assert engine._hooked.model is merged
    assert engine.tokenizer is not None


def test_an_image_text_model_is_loaded_for_its_text(tmp_path: Path) -> None:
    tiny(transformers.Qwen2VLForConditionalGeneration).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    engine = TransformersEngine.load(tmp_path, device="cpu")
    assert engine.info.architecture == "Qwen2VLForConditionalGeneration"
