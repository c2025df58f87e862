"""The canonical bytes: complete, deterministic, and refused when they are anything else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save

from steer.artefacts.sae import SAE, SUPPORTED, FeatureLabel
from steer.errors import FileFormatError
from steer.spec import Where

LABELS = {
    7: FeatureLabel(text="French words", attribute="language", direction="fr", auroc=0.97),
    3: FeatureLabel(text="German words", attribute="language", direction="de", auroc=0.92),
    5: FeatureLabel(text="polite refusals", tokens=("sorry",)),
}


@pytest.mark.parametrize("architecture", SUPPORTED)
def test_everything_comes_back(make_sae, architecture):
    where = Where.model_validate({"phases": ["prompt"], "except": {"positions": [[0, 1]]}})
    sae = make_sae(
        architecture,
        labels=LABELS,
        site="resid_mid",
        subtract_b_dec=architecture == "matching_pursuit",
        default_where=where,
        description="d",
        provenance={"steps": 3},
        name="mine",
    )

    again = SAE.from_bytes(sae.to_bytes(), name="other")

    assert again.card == sae.card.model_copy(update={"name": "other"})
    assert (again.architecture, again.k, again.subtract_b_dec, again.normalize) == (
        sae.architecture,
        sae.k,
        sae.subtract_b_dec,
        "none",
    )
    assert again.labels == LABELS
    for tensor in ("W_enc", "b_enc", "W_dec", "b_dec"):
        assert torch.equal(getattr(again, tensor), getattr(sae, tensor))
    assert again.to_bytes() == sae.to_bytes()
    assert (again.layer, again.site, again.d_in, again.d_sae) == (2, "resid_mid", 12, 40)


def test_identity_is_of_the_content_not_of_the_name(make_sae):
    sae = make_sae(labels=LABELS)
    assert make_sae(labels=dict(reversed(LABELS.items())), name="x").sha256 == sae.sha256
    assert make_sae(labels={}).sha256 != sae.sha256
    assert make_sae(labels=LABELS, b_dec=torch.zeros(12)).sha256 != sae.sha256
    assert make_sae(labels=LABELS, subtract_b_dec=False).sha256 != sae.sha256


@given(cut=st.integers(0, 4000), junk=st.binary(max_size=40))
def test_damaged_bytes_are_refused(make_sae, cut, junk):
    whole = make_sae().to_bytes()
    with pytest.raises(FileFormatError):
        SAE.from_bytes(whole[:cut] + junk)


def test_another_safetensors_file_is_refused():
    with pytest.raises(FileFormatError, match="not a canonical SAE file"):
        SAE.from_bytes(save({"W_enc": torch.zeros(2, 2)}))


def test_labels_of_features_that_do_not_exist_are_refused(make_sae):
    with pytest.raises(FileFormatError, match="labels for the features \\[40\\]"):
        make_sae(labels={40: FeatureLabel(text="x")})


def test_search_finds_words_and_beginnings_of_words(make_sae):
    sae = make_sae(labels=LABELS)

    def found(query: str, **limit: int) -> list[int]:
        return [match.feature for match in sae.search(query, **limit)]

    assert found("french") == [7]
    assert found("lang") == [7, 3]
    assert found("german words") == [3, 7]
    assert found("SORRY") == [5]
    assert found("words", limit=1) == [7]
    assert found("nothing") == []
    assert found("") == []


def test_search_puts_features_that_cause_before_those_that_only_detect(make_sae):
    cause = FeatureLabel(text="formal", auroc=0.81, effect=0.9)
    sae = make_sae(labels={2: FeatureLabel(text="formal", auroc=0.99), 9: cause})
    assert [match.feature for match in sae.search("formal")] == [9, 2]
