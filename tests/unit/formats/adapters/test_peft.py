"""Folders that PEFT saves, read as oracles; and those that are none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from steer.artefacts.oracle import Oracle
from steer.artefacts.oracle_form import FORMS
from steer.engines.vllm.front.lora_requests import write_peft
from steer.errors import SteerError
from steer.formats.importing import read_artefact
from steer.formats.options import ImportOptions

ABOUT = {
    "special_token": " ?",
    "hook_onto_layer": 1,
    "steering_coefficient": 2.0,
    "act_layer_combinations": [[1], [2]],
    "prefix_template": "Layer: {layer}\\n{special_token} * {num_positions} \\n",
}


@pytest.fixture
def saved(tmp_path: Path) -> Any:
    """A function that lets PEFT save an adapter of a tiny model, with its options."""
    from peft import LoraConfig, get_peft_model

    def save(**options: Any) -> Path:
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=32,
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=3,
                num_attention_heads=2,
                num_key_value_heads=2,
            )
        )
        fields = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"], **options}
        adapted = get_peft_model(model, LoraConfig(**fields))
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter)
        adapted.save_pretrained(tmp_path / "adapter", save_embedding_layers=False)
        return tmp_path / "adapter"

    return save


def read(folder: Path, **options: Any) -> Oracle:
    found = read_artefact(folder, ImportOptions(**options), scratch=None, unpacked_limit=0)
    assert isinstance(found, Oracle)
    return found


def about(folder: Path, **changes: Any) -> Path:
    (folder / "ao_config.json").write_text(json.dumps(ABOUT | changes))
    return folder


def test_an_activation_oracle_says_how_it_is_asked(saved: Any) -> None:
    oracle = read(about(saved()))
    assert oracle.form == FORMS["activation_oracle"].model_copy(update={"strength": 2.0})
    card = oracle.card
    assert (card.width, card.layers, card.default_layers) == (16, (0, 1, 2), (1, 2))
    assert set(oracle.lora.parts) == {
        f"model.layers.{n}.{name}"
        for n in range(3)
        for name in ("self_attn.q_proj", "mlp.down_proj")
    }
    part = oracle.lora.parts["model.layers.0.mlp.down_proj"]
    assert (part.down.shape, part.up.shape, part.scale) == ((4, 24), (16, 4), 2.0)
    again = Oracle.from_bytes(oracle.to_bytes(), name="o")
    assert (again.sha256, again.form) == (oracle.sha256, oracle.form)
    assert again.lora.sha256 == oracle.lora.sha256


@pytest.mark.parametrize(
    ("options", "scale"),
    [
        ({"use_rslora": True}, 4.0),
        ({"alpha_pattern": {"down_proj": 16}}, 4.0),
        ({"rank_pattern": {"down_proj": 2}}, 4.0),
    ],
)
def test_scales_are_pefts_own(saved: Any, options: dict[str, Any], scale: float) -> None:
    oracle = read(saved(**options), source="latentqa")
    assert oracle.form == FORMS["latent_qa"]
    assert oracle.lora.parts["model.layers.1.mlp.down_proj"].scale == scale


@pytest.mark.parametrize(
    ("options", "code", "words"),
    [
        ({"use_dora": True}, "unhonoured_metadata", "use_dora"),
        ({"bias": "all"}, "unhonoured_metadata", "bias"),
        ({"modules_to_save": ["lm_head"]}, "unhonoured_metadata", "modules_to_save"),
    ],
)
def test_more_than_plain_lora_is_refused(
    saved: Any, options: dict[str, Any], code: str, words: str
) -> None:
    with pytest.raises(SteerError, match=words) as caught:
        read(about(saved(**options)))
    assert caught.value.code == code


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"hook_onto_layer": -1}, "invalid_card"),
        ({"special_token": ""}, "invalid_card"),
        ({"steering_coefficient": "much"}, "invalid_card"),
        ({"prefix_template": "Answer: {special_token}"}, "unhonoured_metadata"),
    ],
)
def test_a_configuration_of_something_else_is_refused(
    saved: Any, changes: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        read(about(saved(), **changes))
    assert caught.value.code == code


def test_an_adapter_of_unknown_purpose_is_refused(saved: Any) -> None:
    folder = saved()
    with pytest.raises(SteerError, match=r"ao_config\.json") as caught:
        read(folder)
    assert (caught.value.code, caught.value.param) == ("model_weights", "/from")


def test_pickles_and_halves_are_refused(saved: Any) -> None:
    folder = about(saved())
    weights = folder / "adapter_model.safetensors"
    import safetensors.torch

    tensors = safetensors.torch.load_file(weights)
    first = sorted(tensors)[0]
    for change, code in (
        ({k: v for k, v in tensors.items() if k != first}, "unknown_layout"),
        ({**tensors, "base_model.model.lm_head.weight": torch.ones(2, 2)}, "unknown_layout"),
        ({**tensors, first: tensors[first] / 0}, "not_finite"),
        ({**tensors, first: tensors[first][:1]}, None),
    ):
        safetensors.torch.save_file({k: v.contiguous() for k, v in change.items()}, weights)
        with pytest.raises(SteerError) as caught:
            read(folder)
        assert code is None or caught.value.code == code
    weights.unlink()
    with pytest.raises(SteerError) as caught:
        read(folder)
    assert caught.value.code == "unknown_layout"
    (folder / "adapter_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(SteerError) as caught:
        read(folder)
    assert caught.value.code == "pickle_refused"


def test_what_is_written_for_vllm_is_read_as_the_same(saved: Any, tmp_path: Path) -> None:
    oracle = read(about(saved()))
    write_peft(tmp_path / "again", oracle.lora)
    again = read(about(tmp_path / "again"))
    for name, part in oracle.lora.parts.items():
        other = again.lora.parts[name]
        torch.testing.assert_close(
            other.scale * other.up @ other.down, part.scale * part.up @ part.down
        )
