"""A clamp through `reads` and `writes` is the clamp of the whole SAE with its error kept."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from artefacts import EVERYTHING, shape_of
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.encoders import LatentRows, TopKEncoder
from steer.edits import Block, apply
from steer.errors import IncompatibleArtefact
from steer.laws import Law
from steer.plan.compiler import compile_plan
from steer.plan.sources import Sources
from steer.spec import parse_spec

D_IN, D_SAE = 12, 40
READ_BY_ROWS = ("standard", "jumprelu", "topk")
NORMALISATIONS = ("none", "expected_average_only_in", "layer_norm", "constant_norm_rescale")


def measured(reads, x):
    """The K values read of each token, and the length that a change of them is written in."""
    a, length = x @ reads.read.T, torch.ones(len(x), 1)
    if reads.measure == "cosine":
        length = x.norm(dim=-1, keepdim=True)
        a = a / length
    if reads.measure == "centred":
        length = x.std(dim=-1, keepdim=True)
        a = a / (length + 1e-5)
    return a + reads.bias, length * reads.write_scale


def activations_by_rows(sae, features, x):
    """The features' activations from their rows alone (all rows where they compete)."""
    if sae.k is None:
        reads = sae.reads(features)
        a, _ = measured(reads, x)
        return torch.where(a > reads.threshold, a, 0.0)
    reads = sae.reads(None)
    a, _ = measured(reads, x)
    last_kept = a.topk(sae.k, dim=-1).values[:, -1:]
    return torch.where((a >= last_kept) & (a > reads.threshold), a, 0.0)[:, features]


@settings(max_examples=60, deadline=None)
@given(
    fields=st.fixed_dictionaries(
        {
            "architecture": st.sampled_from(READ_BY_ROWS),
            "subtract_b_dec": st.booleans(),
            "normalize": st.sampled_from(NORMALISATIONS),
            "seed": st.integers(0, 1000),
        }
    ),
    features=st.lists(st.integers(0, D_SAE - 1), min_size=1, max_size=5, unique=True),
    value=st.floats(-4, 12, width=32),
)
def test_rows_clamp_as_encode_edit_decode_and_error_do(make_sae, float64, fields, features, value):
    sae = make_sae(**fields)
    x = 2 * torch.randn(6, D_IN, generator=torch.Generator().manual_seed(fields["seed"] + 1))
    exact = x.double().numpy()
    clean = float64(sae).encode(exact)
    edited = clean.copy()
    edited[:, features] = value
    error = exact - float64(sae).decode(clean, exact)
    expected = float64(sae).decode(edited, exact) + error

    _, length = measured(sae.reads(features), x)
    delta = length * ((value - activations_by_rows(sae, features, x)) @ sae.writes(features))

    np.testing.assert_allclose((x + delta).numpy(), expected, atol=1e-5)


def test_the_last_of_the_k_active_features_is_clamped_as_active(make_sae, float64):
    # It is read twice, by products of different shapes and so of different rounding.
    sae = make_sae("topk")
    x = 2 * torch.randn(400, D_IN, generator=torch.Generator().manual_seed(3))
    exact = x.double().numpy()
    active = float64(sae).encode(exact)
    last = np.argsort(-float64(sae).pre_activations(exact), axis=-1)[:, sae.k - 1]
    every = sae.reads(None)
    encoder = TopKEncoder(sae.sha256, LatentRows(every.read, every.bias), sae.k)
    assert set(last) == set(range(D_SAE))

    for feature in range(D_SAE):
        reads = sae.reads([feature])
        law = Law.toward(1.5, "set", bias=float(reads.bias), threshold=0.0)
        block = Block.of_edits(reads.read, sae.writes([feature]), [law], encoder=encoder)
        row = sae.writes([feature]).double().numpy()
        expected = exact + (1.5 - active[:, [feature]]) * row
        np.testing.assert_allclose(apply(block, x).numpy(), expected, atol=1e-5)


@pytest.mark.parametrize("subtract", [True, False])
def test_reads_of_all_features_give_the_pre_activations(make_sae, subtract):
    sae = make_sae(subtract_b_dec=subtract)
    x = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(1))

    reads = sae.reads(None)

    assert reads.read.shape == (D_SAE, D_IN)
    torch.testing.assert_close(x @ reads.read.T + reads.bias, sae.pre_activations(x))
    assert torch.equal(sae.writes(None), sae.W_dec)


def test_a_negative_threshold_reads_as_zero(make_sae):
    sae = make_sae("jumprelu", threshold=torch.full((D_SAE,), -1.0))
    x = torch.randn(6, D_IN, generator=torch.Generator().manual_seed(1))
    assert torch.equal(sae.reads([3]).threshold, torch.zeros(1))
    torch.testing.assert_close(activations_by_rows(sae, [3], x), sae.encode(x)[:, [3]])


@pytest.mark.parametrize("feature", [-1, D_SAE])
@pytest.mark.parametrize("method", ["reads", "writes"])
def test_a_feature_out_of_range_is_refused(make_sae, method, feature):
    with pytest.raises(
        IncompatibleArtefact, match=f"feature {feature} .* features 0 to 39"
    ) as caught:
        getattr(make_sae(), method)([0, feature])
    assert caught.value.code == "feature_out_of_range"


def test_rows_that_are_read_centred_do_not_see_the_mean(make_sae):
    reads = make_sae(normalize="layer_norm").reads(None)
    assert reads.measure == "centred"
    torch.testing.assert_close(reads.read.sum(-1), torch.zeros(D_SAE), atol=1e-5, rtol=0)


@pytest.mark.parametrize("architecture", READ_BY_ROWS)
@pytest.mark.parametrize("normalize", ["layer_norm", "constant_norm_rescale"])
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0])
def test_rows_of_an_sae_that_scales_each_token_say_by_what(
    make_sae, float64, architecture, normalize, scale
):
    """The change is decode(clamped) − decode(f), in the token's own units."""
    sae, features = make_sae(architecture, normalize=normalize), [1, 7, 20]
    x = scale * torch.randn(40, D_IN, generator=torch.Generator().manual_seed(4))
    exact = x.double().numpy()
    clean = float64(sae).encode(exact)
    edited = clean.copy()
    edited[:, features] = 1.5
    expected = exact + float64(sae).decode(edited, exact) - float64(sae).decode(clean, exact)

    spec = parse_spec(
        {"interventions": [{"kind": "clamp", "sae": "s", "features": features, "value": 1.5}]}
    )
    sources = Sources(MemoryLibrary(saes={"s": sae}), shape_of(D_IN))
    (rule,) = compile_plan(spec, sources, EVERYTHING).rules

    (block,) = rule.blocks.values()
    np.testing.assert_allclose(apply(block, x).numpy(), expected, rtol=1e-5, atol=1e-5 * scale)
