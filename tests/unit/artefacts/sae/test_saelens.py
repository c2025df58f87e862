"""SAELens directories: version 6, the versions before, and what is wrong with files in the wild."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from steer.artefacts.sae import SAE, SUPPORTED, FeatureLabel, load_directory, save_directory
from steer.artefacts.sae.hook_names import hook_name, parse_hook_name
from steer.errors import FileFormatError, SteerError, Unsupported
from steer.model import HookPoint
from steer.spec import SITES


def write(path: Path, cfg: dict[str, Any] | str, tensors: dict[str, torch.Tensor]) -> Path:
    path.mkdir(exist_ok=True)
    (path / "cfg.json").write_text(cfg if isinstance(cfg, str) else json.dumps(cfg))
    save_file(tensors, path / "sae_weights.safetensors")
    return path


def tensors_of(sae: SAE) -> dict[str, torch.Tensor]:
    return {"W_enc": sae.W_enc, "b_enc": sae.b_enc, "W_dec": sae.W_dec, "b_dec": sae.b_dec}


NEW = {
    "architecture": "standard",
    "d_in": 12,
    "d_sae": 40,
    "apply_b_dec_to_input": False,
    "normalize_activations": "none",
    "metadata": {"hook_name": "blocks.4.hook_resid_post", "model_name": "gpt2-small"},
}


SAVED = [name for name in SUPPORTED if name != "groupmax"]


def test_what_saelens_has_not_is_not_saved_as_its_own(make_sae, tmp_path):
    with pytest.raises(Unsupported, match="no 'groupmax'"):
        save_directory(make_sae("groupmax"), tmp_path / "sae")


@pytest.mark.parametrize("architecture", SAVED)
def test_a_saved_directory_loads_as_it_was(make_sae, tmp_path, architecture):
    labels = {3: FeatureLabel(text="food", auroc=0.93)}
    sae = make_sae(architecture, labels=labels, name="demo", tags=("demo",), site="resid_mid")

    save_directory(sae, tmp_path / "sae")

    again = load_directory(tmp_path / "sae")
    assert again.labels == labels
    assert again.card.tags == ("demo",)
    assert (again.card.name, again.layer, again.site) == ("demo", 2, "resid_mid")
    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert torch.equal(again.encode(x), sae.encode(x))


def test_bfloat16_halves_the_file_and_loads_as_float32(make_sae, tmp_path):
    sae = make_sae()
    save_directory(sae, tmp_path / "full")
    save_directory(sae, tmp_path / "half", dtype=torch.bfloat16)

    again = load_directory(tmp_path / "half")

    assert again.W_enc.dtype == torch.float32
    assert torch.equal(again.W_enc, sae.W_enc.bfloat16().float())
    weights = [
        (tmp_path / name / "sae_weights.safetensors").stat().st_size for name in ("half", "full")
    ]
    assert weights[0] < 0.6 * weights[1]


def test_version_6(make_sae, tmp_path):
    sae = load_directory(write(tmp_path / "sae", NEW, tensors_of(make_sae())))
    assert (sae.layer, sae.site, sae.card.model) == (4, "resid_post", "gpt2-small")
    assert not sae.subtract_b_dec
    assert sae.card.provenance["hook_name"] == "blocks.4.hook_resid_post"


def test_before_version_6(make_sae, tmp_path):
    cfg = {
        "hook_point": "blocks.3.hook_mlp_out",
        "hook_point_layer": 3,
        "activation_fn_str": "topk",
        "activation_fn_kwargs": {"k": 5},
        "normalize_activations": False,
        "model_name": "gpt2",
    }
    sae = load_directory(write(tmp_path / "sae", cfg, tensors_of(make_sae())))
    assert (sae.architecture, sae.k, sae.layer, sae.site) == ("topk", 5, 3, "mlp_out")
    assert (sae.subtract_b_dec, sae.normalize) == (True, "none")


def test_log_thresholds_are_exponentiated(make_sae, tmp_path):
    logs = torch.randn(40, generator=torch.Generator().manual_seed(1))
    tensors = tensors_of(make_sae()) | {"log_threshold": logs}
    sae = load_directory(write(tmp_path / "sae", NEW | {"architecture": "jumprelu"}, tensors))
    torch.testing.assert_close(sae.threshold, logs.exp())


def test_decoder_norms_are_folded(make_sae, tmp_path):
    tensors = tensors_of(make_sae())
    cfg = NEW | {"architecture": "topk", "k": 4, "rescale_acts_by_decoder_norm": True}
    sae = load_directory(write(tmp_path / "sae", cfg, tensors))
    norms = tensors["W_dec"].norm(dim=-1)
    torch.testing.assert_close(sae.W_dec.norm(dim=-1), torch.ones(40))
    torch.testing.assert_close(sae.W_enc, tensors["W_enc"] * norms)
    torch.testing.assert_close(sae.b_enc, tensors["b_enc"] * norms)


@pytest.mark.parametrize("architecture", ["batchtopk", "matryoshka_batchtopk"])
def test_a_batchtopk_saved_in_its_training_is_the_jumprelu_that_it_becomes(
    make_sae, tmp_path, architecture
):
    tensors = tensors_of(make_sae()) | {"topk_threshold": torch.tensor(0.7, dtype=torch.float64)}
    cfg = NEW | {"architecture": architecture, "k": 4.5, "rescale_acts_by_decoder_norm": True}

    sae = load_directory(write(tmp_path / "sae", cfg, tensors))

    x = torch.randn(50, 12, generator=torch.Generator().manual_seed(1)).double()
    norms = tensors["W_dec"].double().norm(dim=-1)
    a = (x @ tensors["W_enc"].double() + tensors["b_enc"].double()) * norms
    features = torch.where(a > 0.7, a, torch.zeros_like(a))
    decoded = (features / norms) @ tensors["W_dec"].double() + tensors["b_dec"].double()
    assert (sae.architecture, sae.k) == ("jumprelu", None)
    assert 0.05 < (features > 0).double().mean() < 0.8
    torch.testing.assert_close(sae.encode(x.float()), features.float())
    torch.testing.assert_close(sae.decode(sae.encode(x.float())), decoded.float())


@pytest.mark.parametrize(
    ("architecture", "activation", "advice"),
    [
        (None, "tanh-relu", "it has relu"),
        (None, "gelu", "it has relu"),
        ("standard", "topk", "names its k in activation_fn_kwargs"),
        ("gated", "tanh-relu", "it has relu"),
        ("jumprelu", "tanh-relu", "it has relu or jumprelu"),
        ("topk", "gelu", "it has topk or relu"),
    ],
)
def test_an_activation_that_is_not_run_is_refused(
    make_sae, tmp_path, architecture, activation, advice
):
    """Before version 6 it was named beside the architecture, which says nothing of it."""
    cfg = NEW | {"architecture": architecture, "activation_fn_str": activation, "k": 4}
    with pytest.raises(Unsupported, match=advice) as caught:
        load_directory(write(tmp_path / "sae", cfg, tensors_of(make_sae())))
    assert caught.value.code == "unsupported_activation"
    assert repr(activation) in str(caught.value)


def test_a_known_input_scale_is_folded_and_an_unknown_one_left(make_sae, tmp_path):
    cfg = NEW | {"normalize_activations": "expected_average_only_in"}
    path = write(tmp_path / "sae", cfg, tensors_of(make_sae()))
    plain = load_directory(path)
    (path / "activation_scaler.json").write_text('{"scaling_factor": 0.25}')
    scaled = load_directory(path)

    x = torch.randn(5, 12, generator=torch.Generator().manual_seed(1))
    assert (plain.normalize, scaled.normalize) == ("expected_average_only_in", "none")
    torch.testing.assert_close(scaled.encode(x), plain.encode(0.25 * x))
    z = plain.encode(x)
    torch.testing.assert_close(0.25 * scaled.decode(z), plain.decode(z))


def test_the_card_beside_it_wins(make_sae, tmp_path):
    path = write(tmp_path / "sae", NEW, tensors_of(make_sae()))
    card = {"kind": "sae", "width": 12, "layers": [1], "site": "resid_pre", "description": "mine"}
    (path / "card.json").write_text(json.dumps(card))
    sae = load_directory(path)
    assert (sae.layer, sae.site, sae.card.description) == (1, "resid_pre", "mine")
    assert sae.card.model == "gpt2-small"


CFG_FAULTS = [
    ("{", "not a readable JSON"),
    ("[]", "must hold a JSON object"),
    (NEW | {"d_in": 13}, "d_in = 13, but W_enc is \\[12, 40\\]"),
    (NEW | {"metadata": []}, "'metadata' must be an object"),
    (NEW | {"metadata": {}}, "neither a 'hook_name'"),
    (NEW | {"metadata": {"hook_name": "blocks.4.hook_q"}}, "'blocks.4.hook_q' is not understood"),
    (NEW | {"metadata": {"hook_name": "unembed"}}, "'unembed' is not understood"),
    (NEW | {"hook_head_index": 3}, "single attention head"),
    (NEW | {"architecture": "topk"}, "needs a k from 1 to 40; got None"),
    (NEW | {"architecture": "topk", "k": "4"}, "whole number; got '4'"),
    (NEW | {"architecture": "jumprelu"}, "lacks threshold"),
    (NEW | {"architecture": 4}, "must be a string; got 4"),
]


@pytest.mark.parametrize(("cfg", "message"), CFG_FAULTS)
def test_a_wrong_configuration_is_refused(make_sae, tmp_path, cfg, message):
    path = write(tmp_path / "sae", cfg, tensors_of(make_sae()))
    with pytest.raises(FileFormatError, match=message):
        load_directory(path)


@pytest.mark.parametrize("name", ["temporal", "crosscoder", "new"])
def test_an_architecture_that_cannot_run_is_refused_by_name(make_sae, tmp_path, name):
    path = write(tmp_path / "sae", NEW | {"architecture": name}, tensors_of(make_sae()))
    with pytest.raises(Unsupported, match=repr(name)):
        load_directory(path)


def draw(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_a_gated_sae_is_the_jumprelu_that_it_equals(tmp_path):
    W_enc, W_dec = draw(0, 12, 40) / 12**0.5, draw(1, 40, 12)
    b_gate, b_mag, r_mag, b_dec = 0.5 * draw(2, 40), 0.5 * draw(3, 40), draw(4, 40), draw(5, 12)
    tensors = {"W_enc": W_enc, "W_dec": W_dec, "b_dec": b_dec}
    tensors |= {"b_gate": b_gate, "b_mag": b_mag, "r_mag": r_mag}
    x = draw(6, 200, 12)

    sae = load_directory(
        write(
            tmp_path / "sae", NEW | {"architecture": "gated", "apply_b_dec_to_input": True}, tensors
        )
    )

    inputs = (x - b_dec).double() @ W_enc.double()
    magnitude = (r_mag.double().exp() * inputs + b_mag).relu()
    exact = (inputs + b_gate > 0) * magnitude
    assert sae.architecture == "jumprelu"
    torch.testing.assert_close(sae.encode(x).double(), exact, atol=1e-5, rtol=0)
    # The gate closes on what has a magnitude: else this would be no test of it.
    assert ((magnitude > 0.1) & (exact == 0)).any()
    assert (exact > 0).any()


def test_gate_tensors_of_other_lengths_are_refused(tmp_path):
    tensors = {"W_enc": draw(0, 12, 40), "W_dec": draw(1, 40, 12), "b_dec": draw(5, 12)}
    tensors |= {"b_gate": draw(2, 40), "b_mag": draw(3, 39), "r_mag": draw(4, 40)}
    with pytest.raises(FileFormatError, match=r"b_mag and r_mag .* \[39\]"):
        load_directory(
            write(
                tmp_path / "sae",
                NEW | {"architecture": "gated", "apply_b_dec_to_input": True},
                tensors,
            )
        )


TRANSCODER = {
    "metadata": {"hook_name": "blocks.4.mlp_in", "hook_name_out": "blocks.4.hook_mlp_out"},
}


@pytest.mark.parametrize("threshold", [False, True])
@pytest.mark.parametrize("skip", [False, True])
def test_transcoders_read_one_site_and_write_another(tmp_path, threshold, skip):
    name = "jumprelu_" * threshold + "skip_" * skip + "transcoder"
    tensors = {"W_enc": draw(0, 12, 40), "b_enc": draw(1, 40), "W_dec": draw(2, 40, 9)}
    tensors |= {"b_dec": draw(3, 9)}
    if threshold:
        tensors["threshold"] = draw(4, 40).abs()
    if skip:
        tensors["W_skip"] = draw(5, 9, 12)
    x = draw(6, 5, 12)

    sae = load_directory(
        write(tmp_path / "sae", NEW | TRANSCODER | {"architecture": name, "d_out": 9}, tensors)
    )
    save_directory(sae, tmp_path / "again")
    again = load_directory(tmp_path / "again")

    active = (x @ tensors["W_enc"] + tensors["b_enc"]).relu()
    active = torch.where(active > tensors.get("threshold", torch.zeros(40)), active, 0.0)
    output = active @ tensors["W_dec"] + tensors["b_dec"]
    output = output + x @ tensors["W_skip"].T if skip else output
    for one in (sae, again, SAE.from_bytes(sae.to_bytes())):
        torch.testing.assert_close(one.encode(x), active, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one.decode(one.encode(x), x), output, atol=1e-4, rtol=1e-5)
        assert (one.site, one.write_point, one.d_out) == ("mlp_in", (4, "mlp_out"), 9)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"hook_name": "blocks.4.mlp_in"}, "needs a 'hook_name_out'; got None"),
        (
            {"hook_name": "blocks.4.mlp_in", "hook_name_out": "blocks.5.hook_mlp_out"},
            "reads layer 4 and writes layer 5",
        ),
        (
            {"hook_name": "blocks.4.ln2.hook_normalized", "hook_name_out": "blocks.4.hook_mlp_out"},
            "state 'site'",
        ),
    ],
)
def test_a_transcoder_without_its_hooks_is_refused(tmp_path, metadata, message):
    tensors = {"W_enc": draw(0, 12, 40), "b_enc": draw(1, 40), "W_dec": draw(2, 40, 12)}
    cfg = NEW | {"architecture": "transcoder", "metadata": metadata}
    with pytest.raises(FileFormatError, match=message):
        load_directory(write(tmp_path / "sae", cfg, tensors | {"b_dec": draw(3, 12)}))


def test_a_hook_without_a_site_of_ours_is_where_the_sender_says(tmp_path):
    tensors = {"W_enc": draw(0, 12, 40), "b_enc": draw(1, 40), "W_dec": draw(2, 40, 12)}
    names = {"hook_name": "blocks.4.ln2.hook_normalized", "hook_name_out": "blocks.4.hook_mlp_out"}
    cfg = NEW | {"architecture": "transcoder", "metadata": names}
    path = write(tmp_path / "sae", cfg, tensors | {"b_dec": draw(3, 12)})
    assert load_directory(path, site="mlp_in").site == "mlp_in"


def test_whitening_is_refused_by_name(make_sae, tmp_path):
    cfg = NEW | {"normalize_activations": "covariance_whitening"}
    with pytest.raises(Unsupported, match="covariance_whitening"):
        load_directory(write(tmp_path / "sae", cfg, tensors_of(make_sae())))


WEIGHT_FAULTS = [
    ({"W_enc": None}, "lacks W_enc"),
    ({"b_enc": None, "b_dec": None}, "lacks b_enc, b_dec"),
    ({"W_enc": torch.zeros(12, 40, dtype=torch.int64)}, "holds torch.int64"),
    ({"W_enc": torch.zeros(12)}, "W_enc is \\[12\\]"),
    ({"W_dec": torch.full((40, 12), float("inf"))}, "W_dec contains NaN or Inf"),
    ({"scaling_factor": torch.full((40,), 2.0)}, "fine-tuned scaling_factor"),
]


@pytest.mark.parametrize(("change", "message"), WEIGHT_FAULTS)
def test_wrong_weights_are_refused(make_sae, tmp_path, change, message):
    tensors = {k: v for k, v in (tensors_of(make_sae()) | change).items() if v is not None}
    with pytest.raises(FileFormatError, match=message):
        load_directory(write(tmp_path / "sae", NEW, tensors))


def test_a_scaling_factor_of_ones_means_nothing(make_sae, tmp_path):
    tensors = tensors_of(make_sae()) | {"scaling_factor": torch.ones(40)}
    assert load_directory(write(tmp_path / "sae", NEW, tensors)).d_sae == 40


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ('{"x": {}}', "'x' is not the index"),
        ('{"40": {"text": "x"}}', "the features \\[40\\]"),
        ('{"4": {"auroc": 2}}', "the label of feature 4"),
        ('{"4": {"colour": 2}}', "the label of feature 4"),
    ],
)
def test_wrong_labels_are_refused(make_sae, tmp_path, labels, message):
    path = write(tmp_path / "sae", NEW, tensors_of(make_sae()))
    (path / "labels.json").write_text(labels)
    with pytest.raises(FileFormatError, match=message):
        load_directory(path)


@pytest.mark.parametrize(
    "card", ["{}", '{"kind": "vector", "width": 12, "layers": [1]}', '{"kind": "sae", "width": 12}']
)
def test_a_wrong_card_is_refused(make_sae, tmp_path, card):
    path = write(tmp_path / "sae", NEW, tensors_of(make_sae()))
    (path / "card.json").write_text(card)
    with pytest.raises(FileFormatError, match="card"):
        load_directory(path)


def test_an_empty_directory_is_refused(tmp_path):
    with pytest.raises(FileFormatError, match=r"cfg\.json is not a readable"):
        load_directory(tmp_path)


@settings(
    max_examples=50,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
@given(cut=st.integers(0, 4300), junk=st.binary(max_size=30))
def test_damaged_weights_are_refused(make_sae, tmp_path, cut, junk):
    path = write(tmp_path / "sae", NEW, tensors_of(make_sae()))
    weights = path / "sae_weights.safetensors"
    weights.write_bytes(weights.read_bytes()[:cut] + junk)
    with pytest.raises(SteerError):
        load_directory(path)


def test_what_is_written_is_what_version_6_writes(make_sae, tmp_path):
    save_directory(make_sae("topk"), tmp_path / "sae")
    cfg = json.loads((tmp_path / "sae" / "cfg.json").read_text())
    assert cfg["metadata"] == {"model_name": "tiny", "hook_name": "blocks.2.hook_resid_post"}
    assert (cfg["architecture"], cfg["k"], cfg["d_in"], cfg["d_sae"]) == ("topk", 6, 12, 40)
    assert set(load_file(tmp_path / "sae" / "sae_weights.safetensors")) == set(
        tensors_of(make_sae())
    )


@pytest.mark.parametrize(
    ("name", "point"),
    [
        ("blocks.11.hook_resid_pre", (11, "resid_pre")),
        ("blocks.0.mlp.hook_post", (0, "mlp_act")),
        ("blocks.7.attn.hook_z", (7, "head_out")),
        ("blocks.7.hook_in", (7, "resid_pre")),
        ("blocks.7.hook_out", (7, "resid_post")),
        ("model.layers.4", (4, "resid_post")),
        ("model.layers.4.output", (4, "resid_post")),
        ("model.language_model.layers.4.mlp", (4, "mlp_out")),
        ("transformer.h.4.attn", (4, "attn_out")),
        ("gpt_neox.layers.4.attention.output", (4, "attn_out")),
    ],
)
def test_hook_names(name, point):
    assert parse_hook_name(name) == point


@pytest.mark.parametrize(
    "name", ["blocks.4.ln2.hook_normalized", "model.layers.4.mlp.up_proj", "h"]
)
def test_hook_names_that_are_no_site_are_refused(name):
    with pytest.raises(FileFormatError, match="not understood"):
        parse_hook_name(name)


@pytest.mark.parametrize("site", SITES)
def test_every_site_has_a_hook_name(site):
    assert parse_hook_name(hook_name(HookPoint(5, site))) == (5, site)


def test_saving_over_the_directory_it_was_loaded_from(make_sae, tmp_path):
    # The loaded tensors are mapped from the very file that is replaced.
    save_directory(make_sae(), tmp_path)
    sae = load_directory(tmp_path)
    save_directory(sae, tmp_path, dtype=torch.bfloat16)
    save_directory(sae, tmp_path)
    assert torch.equal(sae.W_enc, make_sae().W_enc)
    assert torch.equal(load_directory(tmp_path).W_dec, make_sae().W_dec)
    assert not list(tmp_path.glob("*.partial"))
