"""A token's direction kept as a vector."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import random_jacobians, random_lens

from steer.artefacts.lens import Lens
from steer.engines.fake.engine import FakeEngine
from steer.errors import SteerError
from steer.fit import fit_token

ENGINE = FakeEngine()
LAYERS, WIDTH = ENGINE.info.n_layers, ENGINE.info.d_model
TOKEN = ENGINE.tokenizer.encode("a")[-1]


def test_the_logit_lens_has_one_row_for_all_layers_and_acts_in_the_middle() -> None:
    vector = fit_token(ENGINE, name="letter", token="a")
    row = ENGINE.token_rows([TOKEN])[0]
    assert vector.card.layers == tuple(range(LAYERS))
    assert vector.card.default_layers == (LAYERS // 2,)
    for layer in range(LAYERS):
        torch.testing.assert_close(vector[layer], row / row.norm())
    made: dict[str, Any] = vector.card.provenance
    assert (made["method"], made["token"], made["text"], made["lens"]) == (
        "token",
        TOKEN,
        "a",
        None,
    )
    assert vector.card.model == ENGINE.info.own_name


@pytest.mark.parametrize(
    "lens", [random_lens(1, LAYERS, WIDTH), random_jacobians(2, LAYERS, WIDTH)]
)
def test_a_lens_has_a_row_for_each_map(lens: Lens) -> None:
    vector = fit_token(ENGINE, name="letter", token_id=TOKEN, lens=lens, layers=(1, 3))
    assert vector.card.layers == vector.card.used_layers == (1, 3)
    for layer in (1, 3):
        row = lens.pulled_back(ENGINE.token_rows([TOKEN]), layer, "resid_post")[0]
        torch.testing.assert_close(vector[layer], row / row.norm())
    made: dict[str, Any] = vector.card.provenance
    assert made["lens"].endswith(f"@{lens.sha256[:12]}")


@pytest.mark.parametrize(
    ("given", "code", "param"),
    [
        ({}, "invalid_option", "/token"),
        ({"token": "a", "token_id": 3}, "invalid_option", "/token"),
        ({"token": "ab"}, "not_one_token", "/token"),
        ({"token_id": 1 << 20}, "unknown_token", "/token_id"),
        ({"token": "a", "site": "mlp_out"}, "unsupported_site", "/site"),
        ({"token": "a", "lens": random_lens(1, LAYERS + 1, WIDTH)},
         "incompatible_artefact", "/lens"),
        ({"token": "a", "lens": Lens.of_jacobians({5: torch.eye(WIDTH)}), "layers": [1]},
         "layer_not_in_vector", "/layers"),
    ],
)  # fmt: skip
def test_what_cannot_be_kept_is_said(given: dict[str, Any], code: str, param: str) -> None:
    with pytest.raises(SteerError) as caught:
        fit_token(ENGINE, name="x", **given)
    assert (caught.value.code, caught.value.param) == (code, param)
