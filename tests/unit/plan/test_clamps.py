"""What a clamp means before any token is seen: which features, which numbers, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import EVERYTHING, artefacts, random_sae, shape_of

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.errors import SpecError, SteerError
from steer.plan.compiler import compile_plan
from steer.plan.file import dump_plan, load_plan
from steer.plan.plan import SteeringPlan
from steer.plan.sources import Sources
from steer.spec import MAX_FEATURES, parse_spec

SAES: dict[str, SAE] = artefacts()["saes"]


def plan_of(clamp: dict[str, Any], **saes: SAE) -> SteeringPlan:
    item = {"kind": "clamp", "sae": "standard", "features": [3, 5], "value": 1.0, **clamp}
    spec = parse_spec({"interventions": [{k: v for k, v in item.items() if v is not None}]})
    return compile_plan(spec, Sources(MemoryLibrary(saes={**SAES, **saes}), shape_of()), EVERYTHING)


def block_of(plan: SteeringPlan) -> Any:
    ((block,),) = (rule.blocks.values() for rule in plan.rules)
    return block


def family() -> SAE:
    """Features 10 and 20 write nearly what 3 does, and 30 what 5 does; 40 the opposite of 3."""
    sae = random_sae("jumprelu", seed=7)
    rows = torch.nn.functional.normalize(sae.W_dec, dim=-1)
    away = rows - (rows @ rows[3])[:, None] * rows[3]
    away = torch.nn.functional.normalize(away, dim=-1)
    rows[10] = 0.8 * rows[3] + 0.6 * away[10]
    rows[20] = 3.0 * rows[3] + 0.3 * away[20]
    rows[30] = rows[5]
    rows[40] = -rows[3]
    fields = {name: getattr(sae, name) for name in ("W_enc", "b_enc", "b_dec", "threshold")}
    return SAE.of("jumprelu", W_dec=rows, layer=1, **fields)


@pytest.mark.parametrize(
    ("least", "found"), [(0.79, [20, 30, 10]), (0.9, [20, 30]), (1.0, [30]), (0.999, [30])]
)
def test_absorbers_are_the_features_that_write_what_the_named_do(
    least: float, found: list[int]
) -> None:
    plan = plan_of({"sae": "family", "value": [1.0, 2.0], "with_absorbers": least}, family=family())
    entry = plan.summary[0]
    assert entry["features"] == [3, 5, *sorted(found)]
    assert entry["value"] == [1.0, 2.0, *({10: 1.0, 20: 1.0, 30: 2.0}[n] for n in sorted(found))]
    assert entry["with_absorbers"] == least
    assert block_of(plan).n_edits == 2 + len(found)


def test_absorbers_are_clamped_in_the_mode_of_those_they_absorb() -> None:
    asked = {"sae": "family", "with_absorbers": 0.79}
    dropped = plan_of({**asked, "value": None, "mode": "drop"}, family=family())
    by_hand = {"sae": "family", "features": [3, 5, 10, 20, 30], "value": None, "mode": "drop"}
    assert torch.equal(block_of(dropped).laws, block_of(plan_of(by_hand, family=family())).laws)
    shares = plan_of({**asked, "value": {"norm": [0.5, 0.25]}}, family=family())
    assert shares.summary[0]["value"] == {"norm": [0.5, 0.25, 0.5, 0.5, 0.25]}


def test_more_absorbers_than_a_clamp_takes_are_refused() -> None:
    size = MAX_FEATURES + 9
    row = torch.ones(size, 16)
    alike = SAE.of(
        "standard", W_enc=row.T, b_enc=torch.zeros(size), W_dec=row, b_dec=torch.zeros(16), layer=1
    )
    with pytest.raises(SpecError, match="ask for a larger cosine") as caught:
        plan_of({"sae": "alike", "with_absorbers": 0.5}, alike=alike)
    assert caught.value.code == "too_many_absorbers"
    assert caught.value.param == "/interventions/0/with_absorbers"


def test_all_rows_of_a_large_sae_are_not_put_into_a_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("steer.plan.clamps._MOST_NUMBERS", 2 * 64 * 16 - 1)
    with pytest.raises(SteerError, match="64 features of width 16 are 2048 numbers") as caught:
        plan_of({"mode": "keep_only", "value": None})
    assert (caught.value.code, caught.value.param) == (
        "keep_only_too_large",
        "/interventions/0/mode",
    )


@pytest.mark.parametrize(
    ("clamp", "words"),
    [
        ({"mode": "drop"}, "leave 'value' out"),
        ({"mode": "keep_only"}, "leave 'value' out"),
        ({"value": None}, "mode 'set' needs a 'value'"),
        ({"mode": "scale", "value": {"norm": 0.1}}, "a factor has no norm"),
        ({"mode": "scale", "only_if_active": True}, "leave 'only_if_active' out"),
        ({"mode": "drop", "value": None, "only_if_active": True}, "leave 'only_if_active' out"),
        ({"balance": 1.0}, "the mode is 'set'"),
        ({"mode": "add", "balance": 0}, "greater than 0"),
        ({"with_absorbers": 1.5}, "less than or equal to 1"),
        ({"value": {"norm": [0.1]}}, "lists 1 numbers for 2 features"),
        ({"only_if_active": 1}, "valid boolean"),
        ({"value": {"norm": float("nan")}}, "finite"),
        ({"value": {"norm": {"norm": 1}}}, "valid number"),
        ({"value": [1.0, None]}, "valid number"),
    ],
)
def test_what_says_nothing_in_a_mode_is_refused(clamp: dict[str, Any], words: str) -> None:
    with pytest.raises(SpecError, match=words) as caught:
        plan_of(clamp)
    assert caught.value.code == "invalid_spec"
    assert str(caught.value.param).startswith("/interventions/0")


@pytest.mark.parametrize("mode", ["set", "at_least", "at_most"])
def test_a_target_in_norms_of_an_sae_that_measures_deviations_is_refused(mode: str) -> None:
    with pytest.raises(SteerError, match="measures a token's activations in its dev") as caught:
        plan_of({"sae": "standard-centred", "value": {"norm": 0.1}, "mode": mode})
    assert (caught.value.code, caught.value.param) == ("norm_of_centred", "/interventions/0/value")


def test_a_row_without_a_direction_is_no_share_of_a_norm() -> None:
    sae = random_sae("standard")
    assert isinstance(sae.decoder.matrix, torch.Tensor)
    sae.decoder.matrix[5] = 0
    with pytest.raises(SpecError, match="decoder row of feature 5 is zero") as caught:
        plan_of({"sae": "flat", "value": {"norm": 0.1}}, flat=sae)
    assert caught.value.code == "no_direction"


def test_what_is_added_whatever_the_features_are_is_a_constant() -> None:
    block = block_of(plan_of({"mode": "add", "value": [2.0, -1.0]}))
    writes = SAES["standard"].W_dec
    torch.testing.assert_close(block.shift, 2 * writes[3] - writes[5])
    assert block.is_shift
    (law,) = block_of(plan_of({"mode": "add", "value": {"norm": 0.5}})).laws
    assert law.tolist() == [*[0.0, -torch.inf, 1.0, 0.0, -torch.inf, torch.inf], 1.0, 0.0, 0.0]


@pytest.mark.parametrize(
    "clamp", [{"mode": "add", "value": 0}, {"mode": "scale"}, {"mode": "add", "value": {"norm": 0}}]
)
def test_a_clamp_that_changes_nothing_has_no_block(clamp: dict[str, Any]) -> None:
    assert plan_of(clamp).rules == ()


def test_the_names_of_clamps_without_the_new_fields_are_what_they_were() -> None:
    item = {"kind": "clamp", "sae": "s", "features": [1], "value": 2.0}
    spec = parse_spec({"interventions": [item]})
    (dumped,) = spec.model_dump(exclude_none=True)["interventions"]
    assert dumped == {**item, "features": (1,), "mode": "set"}


@pytest.mark.parametrize(
    ("clamp", "columns"),
    [
        ({}, 7),
        ({"sae": "standard-rescaled"}, 8),
        ({"value": {"norm": 0.1}}, 9),
        ({"sae": "standard-centred"}, 9),
        ({"only_if_active": True}, 9),
        ({"sae": "topk-centred"}, 9),
        ({"sae": "topk-rescaled"}, 8),
    ],
)
def test_files_hold_as_much_of_laws_as_says_something(clamp: dict[str, Any], columns: int) -> None:
    """A process of an older version refuses columns that it does not know."""
    plan = plan_of(clamp)
    data = dump_plan(plan)
    assert f"[2,{columns}]".encode() in data
    sae = SAES[clamp.get("sae", "standard")]

    def encoder(identity: str) -> tuple[torch.Tensor, torch.Tensor]:
        assert identity == sae.sha256
        every = sae.reads(None)
        return every.read, every.bias

    read, wrote = block_of(load_plan(data, encoder)), block_of(plan)
    assert torch.equal(read.laws, wrote.laws)
    assert (read.cutoff is None) == (wrote.cutoff is None)
    if wrote.cutoff is not None:
        assert read.cutoff.measure == wrote.cutoff.measure


def test_features_that_compete_otherwise_than_by_rank_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SAE, "competitive", property(lambda _: True))
    with pytest.raises(SteerError, match="standard SAE cannot be clamped") as caught:
        plan_of({})
    assert caught.value.code == "competitive_sae"
    assert plan_of({"mode": "add"}).rules
