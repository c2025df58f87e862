"""Models in GGUF files: what they say is what is served, or they are refused for what they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from gguf.quants import dequantize, quantize
from tiny_gguf import END, OLD_END, START, Quantised, tensors, tiny_llama, write_gguf_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.checkpoints.found import converted, find_model
from steer.engines.transformers.checkpoints.gguf.configuration import ROPE_FREQUENCIES
from steer.engines.transformers.checkpoints.gguf.naming import name_of
from steer.engines.transformers.checkpoints.gguf.tokenizer import SPLITS
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))


def folder_of(path: Path) -> str:
    return converted(path, lambda line: None).location


def test_every_weight_is_the_files(tmp_path: Path) -> None:
    folder = folder_of(write_gguf_model(tmp_path / "tiny.gguf"))
    model, plain = AutoModelForCausalLM.from_pretrained(folder), tiny_llama()
    for (name, mine), (_, theirs) in zip(
        model.state_dict().items(), plain.state_dict().items(), strict=True
    ):
        assert torch.equal(mine, theirs), name
    ids = torch.tensor([[START, 50, 60, 70]])
    assert torch.equal(model(ids).logits, plain(ids).logits)


@pytest.mark.parametrize("kind", [Quantised.F16, Quantised.BF16, Quantised.Q8_0, Quantised.Q4_1])
def test_quantised_matrices_are_what_they_stand_for(kind: Quantised, tmp_path: Path) -> None:
    folder = folder_of(write_gguf_model(tmp_path / "tiny.gguf", kind=kind))
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert (model.config.dtype, model.dtype) == (torch.float32, torch.float32)
    assert not hasattr(model.config, "quantization_config")
    rows = tensors()["blk.1.ffn_down.weight"]
    wanted = dequantize(quantize(rows, kind), kind)
    assert np.array_equal(model.model.layers[1].mlp.down_proj.weight.detach().numpy(), wanted)


def test_texts_begin_split_and_end_as_the_file_says(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "tiny.gguf")
    tokenizer = AutoTokenizer.from_pretrained(folder_of(path))
    spelled = tokenizer.convert_ids_to_tokens(tokenizer("a 2026<|im_end|>").input_ids)
    assert spelled == ["a", "Ġ", "2", "0", "2", "6", "<|im_end|>"]  # each digit alone
    assert tokenizer.model_max_length == 128
    said = [{"role": "user", "content": "hi"}]
    shown = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
    assert shown == "<|start|>user\nhi<|im_end|>\n<|start|>assistant\n"

    other = {"tokenizer.ggml.pre": "qwen2", "tokenizer.ggml.add_bos_token": True}
    begins = AutoTokenizer.from_pretrained(
        folder_of(write_gguf_model(tmp_path / "begins.gguf", keys=other))
    )
    assert begins("a").input_ids[0] == START
    assert begins("a", add_special_tokens=False).input_ids[0] != START

    whole = {"tokenizer.ggml.pre": "gpt-2"}
    merged = AutoTokenizer.from_pretrained(
        folder_of(write_gguf_model(tmp_path / "merged.gguf", keys=whole))
    )
    assert merged.convert_ids_to_tokens(merged("2026").input_ids) == ["2026"]


def test_generation_ends_where_the_model_ends_its_turn(tmp_path: Path) -> None:
    """At the token that the file names, and at those that are known by their text."""
    path = write_gguf_model(tmp_path / "tiny.gguf")
    config = AutoModelForCausalLM.from_pretrained(folder_of(path)).generation_config
    assert config.eos_token_id == [END, OLD_END]
    with TransformersEngine.load(path, device="cpu") as engine:
        for end in (END, OLD_END):
            sampling = SamplingParams(max_tokens=4, temperature=0, logit_bias=((end, 100.0),))
            (answer,) = engine.complete([GenerationRequest("a", (START,), sampling)])
            assert (answer.tokens, answer.finish) == ((), "stop")


def test_a_model_goes_by_the_name_of_its_file(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "Tiny-1B-Q4_K_M.gguf")
    with TransformersEngine.load(path, device="cpu") as engine:
        assert (engine.info.name, engine.info.own_name) == ("Tiny-1B", "Tiny-1B")
    with TransformersEngine.load(path, name="prod", device="cpu") as engine:
        assert (engine.info.name, engine.info.own_name) == ("prod", "Tiny-1B")
        assert engine.info.is_called("org/Tiny-1B")


@pytest.mark.parametrize(
    ("stem", "name"),
    [
        ("SmolLM2-135M-Instruct.Q4_1", "SmolLM2-135M-Instruct"),
        ("Qwen3-0.6B-UD-Q4_K_XL", "Qwen3-0.6B"),
        ("llama-3.2-1b-instruct-q4_k_m", "llama-3.2-1b-instruct"),
        ("gemma-3-1b-it.i1-IQ3_XXS", "gemma-3-1b-it"),
        ("phi-4-mini-instruct-bf16", "phi-4-mini-instruct"),
        ("Model-GGUF-F16", "Model"),
        ("gpt-oss-20b-MXFP4", "gpt-oss-20b"),
        ("plain", "plain"),
        ("Q8_0", "Q8_0"),
    ],
)
def test_names_are_those_of_the_checkpoint(stem: str, name: str) -> None:
    assert name_of(stem) == name


def test_stretched_positions_of_llama_3_are_taken_over(tmp_path: Path) -> None:
    """Its files hold the frequencies alone; transformers passes over them."""
    path = write_gguf_model(
        tmp_path / "long.gguf",
        keys={"llama.rope.freq_base": 500000.0},
        weights=lambda found: {**found, ROPE_FREQUENCIES: stretched(8.0)},
    )
    config = AutoModelForCausalLM.from_pretrained(folder_of(path)).config
    assert config.rope_parameters == {
        "rope_type": "llama3",
        "rope_theta": 500000.0,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }


def stretched(factor: float) -> np.ndarray:
    """By what Llama 3.1 divides the frequencies of heads of 8, as llama.cpp's script has it."""
    found = []
    for exponent in range(0, 8, 2):
        length = 2 * np.pi * 500000.0 ** (exponent / 8)
        smooth = (8192 / length - 1) / 3
        if length < 8192 / 4:
            found.append(1.0)
        elif length > 8192:
            found.append(factor)
        else:
            found.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(found, dtype=np.float32)


Change = dict[str, Any]


def _without(name: str) -> Change:
    return {"weights": lambda found: {n: rows for n, rows in found.items() if n != name}}


def _with(name: str, rows: np.ndarray) -> Change:
    return {"weights": lambda found: {**found, name: rows}}


REFUSED: dict[str, tuple[Change, str]] = {
    "architecture": ({"architecture": "rwkv7"}, "cannot read its architecture 'rwkv7'"),
    "control vector": ({"architecture": "controlvector"}, "steer vectors add"),
    "projector": ({"keys": {"general.type": "mmproj"}}, "projects images"),
    "adapter": ({"keys": {"general.type": "adapter"}}, "merge it into its base"),
    "part": ({"keys": {"split.count": 2}}, "part 1 of 2.*llama-gguf-split --merge"),
    "no tokenizer": ({"keys": {"tokenizer.ggml.model": None}}, "holds no tokenizer"),
    "no weights": ({"weights": lambda found: {}}, "no weights"),
    "split of text": (
        {"keys": {"tokenizer.ggml.pre": "novel"}},
        "tokenizer.ggml.pre is 'novel', a way of splitting",
    ),
    "no split of text": ({"keys": {"tokenizer.ggml.pre": None}}, "tokenizer.ggml.pre is 'None'"),
    "vocabulary": ({"keys": {"tokenizer.ggml.model": "rwkv"}}, "its tokenizer cannot be made"),
    "no beginning": (
        {"keys": {"tokenizer.ggml.add_bos_token": True, "tokenizer.ggml.bos_token_id": None}},
        "has no bos_token_id",
    ),
    "stretched positions": (
        {"keys": {"llama.rope.scaling.type": "yarn"}},
        "'llama.rope.scaling.type' is 'yarn', and transformers would run it with 'default'",
    ),
    "unknown key": ({"keys": {"llama.logit_scale": 2.0}}, "'llama.logit_scale' .* not one that is"),
    "own frequencies": (_with(ROPE_FREQUENCIES, np.ones(4, np.float32) * 3), "in an unknown way"),
    "weight missing": (_without("blk.1.ffn_up.weight"), "numbers, and transformers makes of them"),
    "weight too many": (_with("blk.1.attn_q.bias", np.ones(32, np.float32)), "numbers, and"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_would_be_another_model_is_refused(kind: str, tmp_path: Path) -> None:
    change, says = REFUSED[kind]
    path = write_gguf_model(tmp_path / "tiny.gguf", **change)
    with pytest.raises(SteerError, match=says) as refusal:
        folder_of(path)
    assert refusal.value.code == "model_not_loaded"
    assert str(path) in refusal.value.message
    assert not list((tmp_path / "cache").rglob("*.part"))


BYTES: dict[str, tuple[Callable[[bytes], bytes], str, str]] = {
    "cut off": (lambda data: data[:-100], "model_not_loaded", "truncated; fetch the file again"),
    "cut off early": (lambda data: data[:900], "model_not_loaded", "fetch the file again"),
    "other bytes": (lambda data: b"PK" + data[2:], "model_not_loaded", "does not begin with GGUF"),
    "big-endian": (
        lambda data: data[:4] + data[4:8][::-1] + data[8:],
        "model_not_loaded",
        "GGUF v",
    ),
    "pointer": (lambda data: b"version https://git-lfs", "lfs_pointer", "git lfs pull"),
    "page": (lambda data: b"<!doctype html>", "web_page", "is a web page"),
    "nothing": (lambda data: b"", "model_not_loaded", "truncated"),
}


@pytest.mark.parametrize("kind", BYTES)
def test_what_is_no_whole_file_is_refused(kind: str, tmp_path: Path) -> None:
    change, code, says = BYTES[kind]
    path = write_gguf_model(tmp_path / "tiny.gguf")
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(SteerError, match=says) as refusal:
        folder_of(path)
    assert refusal.value.code == code


def test_a_file_is_known_by_its_content(tmp_path: Path) -> None:
    path = write_gguf_model(tmp_path / "blob-without-a-name")
    assert find_model(path, lambda line: None).own_name == "blob-without-a-name"


def test_a_file_that_is_not_there_is_not_taken_for_a_name_on_the_hub() -> None:
    with pytest.raises(SteerError, match="No such file") as refusal:
        TransformersEngine.load("nowhere/x.gguf", device="cpu")
    assert refusal.value.code == "model_not_loaded"


def test_the_ways_of_splitting_are_expressions() -> None:
    from tokenizers import Regex, pre_tokenizers

    assert {"llama-bpe", "qwen2", "gpt-2", "tekken", "smollm"} <= SPLITS.keys()
    for name, splits in SPLITS.items():
        for split in splits:
            pieces = pre_tokenizers.Split(Regex(split), "isolated").pre_tokenize_str(
                "It's 2026 à la"
            )
            assert "".join(piece for piece, _ in pieces) == "It's 2026 à la", name
