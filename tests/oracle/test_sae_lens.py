"""SAEs against sae-lens: its directories, its activations, its clamps with the error term."""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import steer
from steer.artefacts.sae import SAE, load_directory, save_directory

pytestmark = pytest.mark.slow

LAYER = 1
FEATURES = [3, 40, 77]
VALUE = 2.5
SCALE = 0.7
CLAMPED = ("standard", "jumprelu", "topk")
NORMALISATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]


def _cases() -> dict[str, dict[str, Any]]:
    """Every architecture × b_dec subtraction × normalisation × decoder rescaling (TopK only)."""
    cases = {}
    combinations = itertools.product(CLAMPED, (True, False), NORMALISATIONS, (False, True))
    for seed, (architecture, subtract, normalize, rescale) in enumerate(combinations):
        if rescale and architecture != "topk":
            continue
        config: dict[str, Any] = {
            "apply_b_dec_to_input": subtract,
            "normalize_activations": normalize,
        }
        if architecture == "topk":
            config |= {"k": 8, "rescale_acts_by_decoder_norm": rescale}
        name = f"{architecture}-{normalize}{'-b_dec' * subtract}{'-rescaled' * rescale}"
        cases[name] = {"architecture": architecture, "config": config, "seed": seed, "clamps": True}
    return cases | _encoded_cases()


def _encoded_cases() -> dict[str, dict[str, Any]]:
    """Architectures whose features compete or write elsewhere, and gated: encode and decode."""
    pursuit = {"max_iterations": 6, "residual_threshold": 0.5}
    given: dict[str, dict[str, Any]] = {
        "abstopk": {"k": 8, "rescale_acts_by_decoder_norm": False},
        "abstopk-rescaled": {"k": 8, "rescale_acts_by_decoder_norm": True},
        "gated": {},
        "gated-subtracted": {"apply_b_dec_to_input": True},
        "matching_pursuit": {**pursuit, "apply_b_dec_to_input": True},
        "matching_pursuit-unsubtracted": pursuit,
        # Saved in the middle of their training, run as what they become at its end.
        "batchtopk": {"k": 8.0, "rescale_acts_by_decoder_norm": False},
        "batchtopk-rescaled": {"k": 8.0, "rescale_acts_by_decoder_norm": True},
        "matryoshka_batchtopk": {
            "k": 8.0,
            "rescale_acts_by_decoder_norm": True,
            "matryoshka_widths": [24, 96],
        },
        "transcoder": {},
        "skip_transcoder": {},
        "jumprelu_transcoder": {},
        "jumprelu_skip_transcoder": {},
    }
    return {
        name: {
            "architecture": name.split("-")[0],
            "config": {"apply_b_dec_to_input": False, "normalize_activations": "none", **config},
            "seed": 100 + place,
            "clamps": False,
        }
        for place, (name, config) in enumerate(given.items())
    }


CASES = _cases()
CLAMPS = [name for name, case in CASES.items() if case["clamps"]]
STATIC = [name for name in CLAMPS if "layer_norm" not in name and "constant" not in name]


def _ours(architecture: str) -> SAE:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return 0.3 * torch.randn(shape, generator=generator)

    return SAE.of(
        architecture,
        W_enc=draw(32, 96),
        b_enc=draw(96),
        W_dec=draw(96, 32),
        b_dec=draw(32),
        threshold=draw(96).abs() if architecture == "jumprelu" else None,
        k=8 if architecture == "topk" else None,
        layer=LAYER,
        model="tiny",
    )


@pytest.fixture(scope="module")
def states() -> torch.Tensor:
    return 2 * torch.randn(3, 11, 32, generator=torch.Generator().manual_seed(5))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("saes")


@pytest.fixture(scope="module")
def theirs(
    run_peer: Any, tiny_models: Mapping[str, Path], inputs: Any, states: torch.Tensor, folder: Path
) -> dict[str, torch.Tensor]:
    """What sae-lens computed, and (in `folder`) the directories it wrote."""
    ours = {}
    for architecture, dtype in itertools.product(CLAMPED, (torch.float32, torch.bfloat16)):
        name = f"ours-{architecture}-{dtype}"
        save_directory(_ours(architecture), folder / name, dtype=dtype)
        ours[name] = folder / name
    outputs = run_peer(
        "sae-lens",
        "peer_sae_lens.py",
        {"x": states, "tokens": inputs["tokens"]},
        model=tiny_models["llama"],
        layer=LAYER,
        cases=CASES,
        saves=folder,
        ours=ours,
        features=FEATURES,
        value=VALUE,
        scale=SCALE,
    )
    assert isinstance(outputs, dict)
    return outputs


def close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_its_directories_encode_and_decode_alike(theirs, folder, states, name):
    sae = load_directory(folder / name)

    features = sae.encode(states)

    assert 0.01 < (features != 0).float().mean() < 0.7
    close(features, theirs[f"{name}.features"])
    close(sae.decode(features, states), theirs[f"{name}.decoded"])


@pytest.mark.parametrize("name", STATIC)
def test_a_clamp_equals_its_forward_with_the_error_term(theirs, folder, states, name):
    sae = load_directory(folder / name)
    active = sae.encode(states)[..., FEATURES]
    delta = (VALUE - active) @ sae.writes(FEATURES)
    # Rescaled SAEs count activations in units of the decoder norm on both sides.
    close(states + delta, theirs[f"{name}.clamped"])


@pytest.mark.parametrize("name", STATIC)
def test_a_clamped_model_gives_its_logits(theirs, folder, tiny_models, inputs, name):
    model = AutoModelForCausalLM.from_pretrained(tiny_models["llama"]).eval()
    spec = {"interventions": [{"kind": "clamp", "sae": "s", "features": FEATURES, "value": VALUE}]}

    with torch.no_grad(), steer.attach(model, spec, saes={"s": load_directory(folder / name)}):
        logits = model(inputs["tokens"]).logits

    torch.testing.assert_close(logits, theirs[f"{name}.logits"], atol=1e-5, rtol=1e-4)
    assert (logits - theirs["plain"]).abs().max() > 0.1


@pytest.mark.parametrize("name", [name for name in CLAMPS if name not in STATIC])
def test_a_clamp_under_a_scale_per_token_is_its_forward_too(theirs, folder, states, name):
    sae = load_directory(folder / name)
    reads, active = sae.reads(FEATURES), sae.encode(states)[..., FEATURES]
    centred = reads.measure == "centred"
    length = states.std(dim=-1) if centred else states.norm(dim=-1)
    length = length[..., None] * reads.write_scale
    delta = length * ((VALUE - active) @ sae.writes(FEATURES))
    close(states + delta, theirs[f"{name}.clamped"])


@pytest.mark.parametrize("name", [name for name in CASES if "expected_average" in name])
def test_a_trainers_input_scale_is_folded_as_it_folds_it(theirs, folder, states, tmp_path, name):
    for file in (folder / name).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "activation_scaler.json").write_text(json.dumps({"scaling_factor": SCALE}))

    sae = load_directory(tmp_path)

    close(sae.encode(states), theirs[f"{name}.scaled.features"])
    close(sae.decode(sae.encode(states)), theirs[f"{name}.scaled.decoded"])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("architecture", CLAMPED)
def test_it_loads_what_we_save(theirs, folder, states, architecture, dtype):
    name = f"ours-{architecture}-{dtype}"
    sae = load_directory(folder / name)
    close(sae.encode(states), theirs[f"{name}.features"])
    close(sae.decode(sae.encode(states)), theirs[f"{name}.decoded"])
    if dtype == torch.float32:
        close(_ours(architecture).encode(states), theirs[f"{name}.features"])
