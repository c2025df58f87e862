"""Encoding and decoding against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from steer.artefacts.sae import SUPPORTED, architecture_named
from steer.errors import FileFormatError, IncompatibleArtefact, Unsupported

NORMALISATIONS = ["none", "expected_average_only_in", "layer_norm", "constant_norm_rescale"]


@pytest.mark.parametrize("normalize", NORMALISATIONS)
@pytest.mark.parametrize("subtract", [True, False])
@pytest.mark.parametrize("architecture", SUPPORTED)
def test_it_encodes_and_decodes_as_float64_does(
    make_sae, float64, architecture, subtract, normalize
):
    sae = make_sae(architecture, subtract_b_dec=subtract, normalize=normalize)
    x = 3 * torch.randn(2, 7, sae.d_in, generator=torch.Generator().manual_seed(1))
    exact = float64(sae).encode(x.double().numpy())

    features = sae.encode(x)

    np.testing.assert_allclose(features.numpy(), exact, atol=1e-5)
    assert 0 < np.count_nonzero(exact) < exact.size
    restored = sae.decode(features, x)
    np.testing.assert_allclose(
        restored.numpy(), float64(sae).decode(exact, x.double().numpy()), atol=1e-5
    )


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_latents_ignore_threshold_and_competition(make_sae, float64, architecture):
    sae = make_sae(architecture)
    x = torch.randn(5, sae.d_in, generator=torch.Generator().manual_seed(1))

    latents = sae.latents(x)

    exact = np.maximum(float64(sae).pre_activations(x.double().numpy()), 0.0)
    np.testing.assert_allclose(latents.numpy(), exact, atol=1e-5)
    if architecture != "standard":
        assert np.count_nonzero(latents) > np.count_nonzero(sae.encode(x))


def test_half_precision_tokens_are_accumulated_in_float32(make_sae):
    sae = make_sae()
    x = torch.randn(5, sae.d_in, generator=torch.Generator().manual_seed(1)).bfloat16()

    features = sae.encode(x)

    assert features.dtype == torch.float32
    assert torch.equal(features, sae.encode(x.float()))


def test_a_feature_at_its_threshold_is_off(make_sae):
    sae = make_sae(
        "jumprelu",
        b_dec=torch.zeros(12),
        b_enc=torch.full((40,), 0.5),
        threshold=torch.full((40,), 0.5),
    )
    assert not sae.encode(torch.zeros(1, 12)).any()


def test_topk_keeps_no_negative_value(make_sae):
    sae = make_sae("topk", b_enc=torch.full((40,), -100.0))
    assert not sae.encode(torch.zeros(1, 12)).any()


def test_a_normalisation_per_token_needs_the_token_to_decode(make_sae):
    sae = make_sae(normalize="layer_norm")
    with pytest.raises(Unsupported, match="decode\\(z, x\\)"):
        sae.decode(torch.zeros(1, sae.d_sae))


def test_a_row_of_another_width_is_refused(make_sae):
    with pytest.raises(IncompatibleArtefact, match="width 12; got 13") as caught:
        make_sae().encode(torch.zeros(1, 13))
    assert caught.value.code == "wrong_width"


@pytest.mark.parametrize("name", ["batchtopk", "matryoshka_batchtopk", "JumpReLU"])
def test_names_that_mean_jumprelu(name):
    assert architecture_named(name).name == "jumprelu"


@pytest.mark.parametrize("name", ["gated", "temporal", "crosscoder", "new"])
def test_other_architectures_are_refused_by_name(name):
    with pytest.raises(
        Unsupported, match=f"{name!r} is not supported.*standard, jumprelu, topk"
    ) as c:
        architecture_named(name)
    assert c.value.code == "unsupported_architecture"


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"W_enc": torch.zeros(12)}, "W_enc must be"),
        ({"b_enc": torch.zeros(39)}, "b_enc has the shape \\[39\\]"),
        ({"W_dec": torch.zeros(12, 40)}, "W_dec has the shape"),
        ({"b_dec": torch.full((12,), float("nan"))}, "b_dec contains NaN"),
        ({"architecture": "topk", "k": None}, "needs a k from 1 to 40; got None"),
        ({"architecture": "topk", "k": 41}, "got 41"),
        ({"architecture": "jumprelu", "threshold": None}, "needs a threshold"),
    ],
)
def test_tensors_that_make_no_sae_are_refused(make_sae, fields, message):
    with pytest.raises(FileFormatError, match=message):
        make_sae(fields.pop("architecture", "standard"), **fields)
