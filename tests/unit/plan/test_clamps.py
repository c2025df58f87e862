"""What a clamp means before any token is seen: which features, which numbers, what is refused."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from artefacts import EVERYTHING, artefacts, random_sae, random_transcoder, random_vector, shape_of

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.storage.rows import held_rows
from steer.errors import SpecError, SteerError
from steer.model import HookPoint
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
        ({"only_if_active": 1}, "true or false is needed"),
        ({"value": {"norm": float("nan")}}, "finite"),
        ({"value": {"norm": {"norm": 1}}}, "a number is needed"),
        ({"value": [1.0, None]}, "a number is needed"),
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

    def find_sae(identity: str) -> SAE:
        assert identity == sae.sha256
        return sae

    read, wrote = block_of(load_plan(data, find_sae)), block_of(plan)
    assert torch.equal(read.laws, wrote.laws)
    assert read.encoder is wrote.encoder


def test_features_that_compete_in_no_known_way_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(SAE, "competitive", property(lambda _: True))
    with pytest.raises(SteerError, match="standard SAE cannot be clamped") as caught:
        plan_of({})
    assert caught.value.code == "competitive_sae"
    assert plan_of({"mode": "add"}).rules


ADDED_IN_SHARES = {"mode": "add", "value": {"norm": 0.5}}


@pytest.mark.parametrize("architecture", ["groupmax", "abstopk", "matching_pursuit"])
def test_features_that_compete_are_added_to_without_a_look_at_the_others(architecture: str) -> None:
    sae = SAES[architecture]
    block = block_of(plan_of({"sae": architecture, "mode": "add", "value": [2.0, -1.0]}))
    torch.testing.assert_close(block.shift, 2 * sae.W_dec[3] - sae.W_dec[5])
    assert block.is_shift


@pytest.mark.parametrize(
    ("sae", "clamp", "message"),
    [
        ("standard", {"k": 3}, "leave 'k' out"),
        ("groupmax", {"k": 3}, "leave 'k' out"),
        ("topk", {"k": 65}, "has 64 features"),
        ("matching_pursuit", {"k": 65}, "has 64 features"),
    ],
)
def test_a_k_that_an_sae_cannot_have_is_refused(
    sae: str, clamp: dict[str, Any], message: str
) -> None:
    with pytest.raises(SteerError, match=message) as caught:
        plan_of({"sae": sae, **clamp})
    assert (caught.value.code, caught.value.param) == ("no_k", "/interventions/0/k")


def test_a_k_for_what_looks_at_no_feature_is_refused() -> None:
    with pytest.raises(SpecError, match="leave 'k' out"):
        plan_of({"sae": "topk", "mode": "add", "k": 3})


def test_plans_of_one_sae_hold_one_encoder() -> None:
    first, second = (block_of(plan_of({"sae": "topk", "features": [n, 5]})) for n in (1, 2))
    assert first.encoder is second.encoder
    other = block_of(plan_of({"sae": "topk", "k": 3}))
    assert other.encoder is not first.encoder
    assert other.encoder.rows.read is first.encoder.rows.read


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_encoder_is_held_in_the_type_of_its_file(dtype: torch.dtype) -> None:
    sae = random_sae("topk")
    half = SAE.of_rows(
        "topk",
        encoder=held_rows(sae.W_enc.T.to(dtype)),
        decoder=sae.decoder,
        b_dec=sae.b_dec,
        k=sae.k,
        layer=1,
    )
    encoder = block_of(plan_of({"sae": "half"}, half=half)).encoder
    assert isinstance(half.encoder.matrix, torch.Tensor)
    assert encoder.rows.read.data_ptr() == half.encoder.matrix.data_ptr()


def test_an_encoder_of_groups_has_their_rows_alone() -> None:
    block = block_of(plan_of({"sae": "groupmax", "features": [3, 5, 20]}))
    assert block.encoder.groups.tolist() == [0, 2]  # 8 groups of 8
    assert len(block.encoder.rows.read) == 16
    assert block.columns == (3, 5, 20)


def test_a_clamp_of_a_transcoder_reads_where_it_reads_and_writes_where_it_writes() -> None:
    plan = plan_of({"sae": "t"}, t=random_transcoder("jumprelu"))
    ((point, block),) = plan.rules[0].blocks.items()
    assert (point, block.reads_at) == (HookPoint(1, "mlp_out"), HookPoint(1, "mlp_in"))
    assert plan.points == (point,)
    assert plan.reached == (block.reads_at, point)
    assert plan.describe()["hook_points"] == [{"layer": 1, "site": "mlp_out"}]
    added = block_of(plan_of({"sae": "t", "mode": "add"}, t=random_transcoder("jumprelu")))
    assert added.is_shift


@pytest.mark.parametrize(
    ("clamp", "latents", "graphless"),
    [
        ({"sae": "standard"}, 0, False),
        ({"sae": "topk"}, 64, False),
        ({"sae": "abstopk"}, 64, False),
        ({"sae": "groupmax"}, 0, True),
        ({"sae": "matching_pursuit"}, 0, True),
        ({"sae": "t"}, 2 + 2, False),
        ({"sae": "ranked"}, 64 + 2 + 2, False),
        ({"sae": "t", "when": {"vector": "v0", "above": 0.0, "layer": 0}}, 2 + 2, False),
        ({"sae": "t", "when": {"vector": "late", "above": 0.0, "layer": 1}}, 2 + 2, True),
    ],
)
def test_a_plan_says_what_kernels_hold_for_it_and_whether_they_can(
    clamp: dict[str, Any], latents: int, graphless: bool
) -> None:
    saes = {**SAES, "t": random_transcoder("jumprelu"), "ranked": random_transcoder("topk")}
    vectors = {"v0": random_vector(0, 0), "late": random_vector(1, 1, site="mlp_out")}
    item = {"kind": "clamp", "features": [3, 5], "value": 1.0, **clamp}
    sources = Sources(MemoryLibrary(vectors=vectors, saes=saes), shape_of())
    plan = compile_plan(parse_spec({"interventions": [item]}), sources, EVERYTHING)
    assert (plan.latents, plan.graphless) == (latents, graphless)


def test_clamps_that_read_at_one_point_are_rules_of_their_own() -> None:
    saes = {"t": random_transcoder("jumprelu"), "far": random_transcoder("standard")}
    far = {"site": "mlp_in", "write_site": "resid_post", "subtract_b_dec": False}
    saes["far"] = random_sae("standard", **far)
    items = [{"kind": "clamp", "sae": name, "features": [3], "value": 1.0} for name in saes]
    plan = compile_plan(
        parse_spec({"interventions": items}),
        Sources(MemoryLibrary(saes=saes), shape_of()),
        EVERYTHING,
    )
    assert [len(rule.blocks) for rule in plan.rules] == [1, 1]


@pytest.mark.parametrize(
    "places",
    [
        {"site": "mlp_out", "write_site": "mlp_in"},
        {"site": "head_out", "write_site": "attn_out"},
    ],
    ids=["backwards", "two widths"],
)
def test_transcoders_that_no_clamp_can_serve_are_refused_but_added_to(
    places: dict[str, Any],
) -> None:
    width = shape_of().width(places["site"])
    sae = random_sae(
        "standard",
        width=width,
        subtract_b_dec=False,
        W_dec=torch.ones(64, 16),
        b_dec=torch.zeros(16),
        **places,
    )
    with pytest.raises(SteerError, match="capture its features") as caught:
        plan_of({"sae": "t"}, t=sae)
    assert (caught.value.code, caught.value.param) == ("two_sites", "/interventions/0/sae")
    assert plan_of({"sae": "t", "mode": "add"}, t=sae).rules


@pytest.mark.parametrize("suffix", ["-rescaled", "-centred"])
def test_a_share_of_the_norm_where_a_transcoder_writes_is_no_length_of_what_it_reads(
    suffix: str,
) -> None:
    sae = random_transcoder("standard" + suffix, W_skip=None)
    with pytest.raises(SteerError, match="the norm where it writes") as caught:
        plan_of({"sae": "t", "value": {"norm": 0.1}}, t=sae)
    assert (caught.value.code, caught.value.param) == (
        "norm_of_two_sites",
        "/interventions/0/value",
    )
    block = block_of(plan_of({"sae": "t", **ADDED_IN_SHARES}, t=sae))
    assert block.reads_at is None


@pytest.mark.parametrize(
    ("item", "param"),
    [({"site": "mlp_in"}, "site"), ({"layers": [2]}, "layers")],
)
def test_a_transcoder_acts_nowhere_else(item: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError, match="acts only at mlp_out of the same layer") as caught:
        plan_of({"sae": "t", **item}, t=random_transcoder("standard"))
    assert caught.value.param == f"/interventions/0/{param}"


def test_a_model_without_the_site_that_a_transcoder_reads_is_told() -> None:
    model = replace(shape_of(), sites=("mlp_out", "resid_post"))
    sources = Sources(MemoryLibrary(saes={"t": random_transcoder("standard")}), model)
    item = {"kind": "clamp", "sae": "t", "features": [3], "value": 1.0}
    with pytest.raises(SteerError, match="'mlp_in'") as caught:
        compile_plan(parse_spec({"interventions": [item]}), sources, EVERYTHING)
    assert (caught.value.code, caught.value.param) == ("unsupported_site", "/interventions/0/sae")


@pytest.mark.parametrize("clamp", [{}, {"mode": "drop", "value": None}])
@pytest.mark.parametrize("name", ["jumprelu", "topk", "groupmax", "abstopk"])
def test_a_clamp_of_a_transcoder_travels_as_a_file(name: str, clamp: dict[str, Any]) -> None:
    sae = random_transcoder(name)
    plan = plan_of({"sae": "t", **clamp}, t=sae)
    read, wrote = (
        block_of(load_plan(dump_plan(plan), lambda _: sae, model=shape_of())),
        block_of(plan),
    )
    assert read.reads_at == wrote.reads_at == HookPoint(1, "mlp_in")
    assert read.encoder is wrote.encoder
    assert read.columns == wrote.columns
