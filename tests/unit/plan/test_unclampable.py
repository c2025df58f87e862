"""SAEs that are read and captured, and whose features no block can hold: refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import EVERYTHING, shape_of

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae import SAE
from steer.errors import Unsupported
from steer.fit.methods.sae_refined import SAERefined
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

TRANSCODER = {"site": "mlp_in", "write_site": "mlp_out", "subtract_b_dec": False}
REFUSED = [
    ("groupmax", {"k": 4}, "competitive_sae"),
    ("abstopk", {"k": 4}, "competitive_sae"),
    ("matching_pursuit", {}, "competitive_sae"),
    ("standard", TRANSCODER, "two_sites"),
]


def an_sae(architecture: str, fields: dict[str, Any]) -> SAE:
    generator = torch.Generator().manual_seed(0)
    W_enc, W_dec = torch.randn(2, 16, 32, generator=generator)
    return SAE.of(
        architecture,
        **{"W_enc": W_enc, "W_dec": W_dec.T, "b_dec": torch.zeros(16), "layer": 1, **fields},
    )


@pytest.mark.parametrize(("architecture", "fields", "code"), REFUSED)
def test_a_clamp_is_refused(architecture: str, fields: dict[str, Any], code: str) -> None:
    library = MemoryLibrary(saes={"s": an_sae(architecture, fields)})
    spec = {"interventions": [{"kind": "clamp", "sae": "s", "features": [3], "value": 2.0}]}
    with pytest.raises(Unsupported, match="capture") as caught:
        PlanCache(library, shape_of(), EVERYTHING).plan(parse_spec(spec))
    assert (caught.value.code, caught.value.param) == (code, "/interventions/0/sae")


@pytest.mark.parametrize("architecture", ["groupmax", "abstopk"])
def test_features_that_compete_can_be_added(architecture: str) -> None:
    sae = an_sae(architecture, {"k": 4})
    clamp = {"kind": "clamp", "sae": "s", "features": [3], "mode": "add", "value": 2.0}
    plans = PlanCache(MemoryLibrary(saes={"s": sae}), shape_of(), EVERYTHING)
    (rule,) = plans.plan(parse_spec({"interventions": [clamp]})).rules
    (block,) = rule.blocks.values()
    torch.testing.assert_close(block.shift, 2.0 * sae.W_dec[3])


def test_a_transcoder_is_no_concept_steerer_and_refines_nothing() -> None:
    sae = an_sae("standard", TRANSCODER)
    spec = {"interventions": [{"kind": "concept", "sae": "s", "text": "x", "strength": 1.0}]}
    plans = PlanCache(
        MemoryLibrary(saes={"s": sae}),
        shape_of(),
        EVERYTHING,
        encode_text=lambda *_: torch.ones(2, 16),
    )
    with pytest.raises(Unsupported, match="transcoder"):
        plans.plan(parse_spec(spec))
    with pytest.raises(Unsupported, match="transcoder"):
        SAERefined(sae, "diffmean")
