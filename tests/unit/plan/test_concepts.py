"""Concepts given in words: what they add, and what a receipt tells of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import EVERYTHING, random_sae, random_transcoder, shape_of

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.engines.fake.engine import FakeEngine
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.plan.compiler import compile_plan
from steer.plan.concepts import MOST_EXPLAINED
from steer.plan.file import dump_plan, load_plan
from steer.plan.plan import SteeringPlan
from steer.plan.sources import EncodeText, Sources
from steer.spec import parse_spec

GENERATOR = torch.Generator().manual_seed(5)
STATES = {text: torch.randn(3, 16, generator=GENERATOR) for text in ("rain", "sun")}
SAE_OF_TEXTS = random_sae(
    "jumprelu", labels={n: FeatureLabel(text=f"about {n}") for n in range(0, 64, 2)}
)


def encode(text: str, point: HookPoint) -> torch.Tensor:
    assert point == HookPoint(1)
    return STATES[text]


def plan_of(
    sae: SAE = SAE_OF_TEXTS, encode_text: EncodeText | None = encode, **fields: Any
) -> SteeringPlan:
    item = {"kind": "concept", "sae": "s", "text": "rain", **fields}
    sources = Sources(MemoryLibrary(saes={"s": sae}), shape_of(), encode_text)
    return compile_plan(parse_spec({"interventions": [item]}), sources, EVERYTHING)


@pytest.mark.parametrize("contrast", [None, "sun"])
def test_an_explained_concept_tells_the_strongest_features_it_lit(contrast: str | None) -> None:
    plan = plan_of(explain=True, contrast=contrast)
    latents = SAE_OF_TEXTS.latents(STATES["rain"]).mean(0)
    if contrast:
        latents = latents - SAE_OF_TEXTS.latents(STATES[contrast]).mean(0)
    ((told),) = plan.explanations
    assert told["intervention"] == 0
    lit = told["features"]
    strongest = sorted(range(64), key=lambda n: -abs(float(latents[n])))[:MOST_EXPLAINED]
    assert [one["feature"] for one in lit] == strongest
    for one in lit:
        assert one["value"] == float(latents[one["feature"]])
        assert one["label"] == ("" if one["feature"] % 2 else f"about {one['feature']}")
    assert any(one["value"] < 0 for one in lit) is (contrast is not None)


def test_what_is_told_is_no_part_of_the_plans_name_and_travels_in_its_file() -> None:
    plan = plan_of(explain=True)
    moved = plan_of(explain=True, encode_text=lambda text, _: STATES[text] * 1.001)
    assert plan.fingerprint == moved.fingerprint
    assert plan.explanations != moved.explanations
    read = load_plan(dump_plan(plan), lambda _: pytest.fail("no encoder is needed"))
    assert read.explanations == plan.explanations


def test_nobody_is_told_who_does_not_ask() -> None:
    plan = plan_of()
    assert plan.explanations == ()
    assert "explain" not in plan.summary[0]
    (item,) = plan.spec.model_dump(exclude_none=True)["interventions"]
    assert "explain" not in item


def test_the_receipt_lists_what_was_lit() -> None:
    from steer.engines.base import GenerationRequest, SamplingParams

    plan = plan_of(explain=True)
    request = GenerationRequest("one", (3, 4, 5), SamplingParams(max_tokens=2), plan)
    (done,) = FakeEngine().complete([request])
    assert done.receipt is not None
    assert done.receipt.as_json()["concepts"] == [dict(one) for one in plan.explanations]


@pytest.mark.parametrize("suffix", ["", "-rescaled", "-centred"])
def test_a_transcoder_reads_a_text_where_it_reads_and_adds_where_it_writes(suffix: str) -> None:
    sae = random_transcoder("standard" + suffix, seed=4)
    asked: list[HookPoint] = []

    def encode_there(text: str, point: HookPoint) -> torch.Tensor:
        asked.append(point)
        return STATES[text]

    ((point, block),) = plan_of(sae, encode_there, strength=2.0).rules[0].blocks.items()
    assert asked == [HookPoint(1, "mlp_in")]
    assert point == HookPoint(1, "mlp_out")
    row = 2.0 * sae.latents(STATES["rain"]).mean(0) @ sae.W_dec * sae.write_scale
    if not suffix:
        torch.testing.assert_close(block.shift, row)
        return
    # What it adds is in the length of the token that it would read.
    assert block.reads_at == HookPoint(1, "mlp_in")
    torch.testing.assert_close(block.write, row[None])


def test_a_concept_needs_a_model() -> None:
    with pytest.raises(Unsupported, match="none is attached here"):
        plan_of(encode_text=None)
