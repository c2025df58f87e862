"""Specs to plans: order, packing, fingerprints, and every way a spec can be wrong."""

from __future__ import annotations

import base64
import math
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import EVERYTHING, artefacts, random_spec, random_vector, shape_of
from float64_reference import Float64Reference

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.detector import Detector
from steer.artefacts.library import MemoryLibrary
from steer.edits import apply
from steer.errors import SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.plan.selection import factors_of
from steer.spec import parse_spec

PROMPT = 5
LENGTH = 9


def cache(**changes: Any) -> PlanCache:
    made = artefacts()
    made["vectors"] |= changes.pop("vectors", {})
    made["detectors"] |= changes.pop("detectors", {})
    limits = EVERYTHING.__class__("test", EVERYTHING.kinds, EVERYTHING.sites, limits={"passes": 8})
    return PlanCache(MemoryLibrary(**made), shape_of(), limits, **changes)


def run(plan: SteeringPlan, point: HookPoint, x: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
    """The plan's passes in order, without tables."""
    for one in plan.rules:
        if point in one.blocks:
            places = np.arange(len(x))
            mask = torch.from_numpy(one.selection.mask(places, PROMPT, ids))
            factors = factors_of([one.selection], places, PROMPT)
            share = None if factors is None else torch.from_numpy(factors[0])
            x = torch.where(mask[:, None], apply(one.blocks[point], x, factors=share), x)
    return x


@pytest.mark.parametrize("seed", range(60))
def test_passes_equal_the_interventions_one_after_another(seed: int) -> None:
    draw = random.Random(seed)
    spec = parse_spec(random_spec(draw, longest=7))
    try:
        plan = cache().plan(spec)
    except SteerError as error:
        assert error.code == "too_many_passes"  # noqa: PT017
        return
    reference = Float64Reference(**artefacts())
    ids = np.array([draw.randrange(64) for _ in range(LENGTH)])
    generator = torch.Generator().manual_seed(5_000 + seed)
    for layer in range(4):
        point = HookPoint(layer)
        x = torch.randn(LENGTH, 16, generator=generator)
        wanted = np.stack(
            [
                reference.steer(spec, point, row, n, PROMPT, int(ids[n]))
                for n, row in enumerate(x.double().numpy())
            ]
        )
        actual = run(plan, point, x, ids).double().numpy()
        assert np.abs(actual - wanted).max() <= 2e-5 * (1 + np.abs(wanted).max())


def test_most_random_specs_fit_into_the_passes_there_are() -> None:
    """The test above would prove nothing if it mostly refused."""
    kept = 0
    for seed in range(60):
        try:
            cache().plan(parse_spec(random_spec(random.Random(seed), longest=7)))
            kept += 1
        except SteerError:
            pass
    assert kept >= 50


def add(vector: str = "v0", **fields: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": vector, "layers": [1], **fields}


def ablate(vector: str = "v0", **fields: Any) -> dict[str, Any]:
    return {"kind": "ablate", "vector": vector, "layers": [1], **fields}


def passes(*items: dict[str, Any], **rest: Any) -> int:
    return len(cache().plan(parse_spec({"interventions": list(items), **rest})).rules)


def test_neighbouring_constants_fuse() -> None:
    items = [add(f"v{n % 6}", strength=0.5 + n) for n in range(40)]
    plan = cache().plan(parse_spec({"interventions": items}))
    (only,) = plan.rules
    (block,) = only.blocks.values()
    assert block.is_shift
    vectors = artefacts()["vectors"]
    wanted = sum((0.5 + n) * vectors[f"v{n % 6}"][1].double() for n in range(40))
    assert torch.allclose(block.shift.double(), wanted, rtol=1e-5, atol=1e-5)


def test_what_cannot_fuse_takes_a_pass_of_its_own() -> None:
    generated = {"phases": ["generation"]}
    assert passes(add(), ablate()) == 2
    assert passes(add(), ablate(), add()) == 3
    assert passes(add(), add(where=generated)) == 2
    assert passes(add(), add(when={"vector": "v1", "above": 0, "layer": 1})) == 2
    assert passes(add(), add(), norm="preserve") == 2


def test_other_hook_points_share_a_pass() -> None:
    assert passes(ablate(), ablate(layers=[2]), ablate(layers=[0], site="mlp_out")) == 1
    assert passes(add(layers=[0, 1]), ablate(layers=[1]), add(layers=[0])) == 2


def test_two_inline_gates_are_two_gates() -> None:
    """They have the same name and bounds; only their directions differ."""
    gates = [
        {"vector": {"data": inline(random_vector(seed, 0))}, "above": 0.1, "layer": 0}
        for seed in (70, 71)
    ]
    assert passes(ablate(when=gates[0]), ablate(layers=[2], when=gates[1])) == 2
    assert passes(ablate(when=gates[0]), ablate(layers=[2], when=gates[0])) == 1


def inline(vector: ControlVector) -> str:
    return base64.b64encode(vector.to_bytes()).decode()


def fingerprint(spec: dict[str, Any]) -> str:
    return cache().plan(parse_spec(spec)).fingerprint


BASE = {"interventions": [add(strength=2)], "where": {"phases": ["prompt"]}}


@pytest.mark.parametrize(
    "same",
    [
        {"interventions": [add(strength=2.0)], "where": {"phases": ["prompt"]}},
        {"interventions": [add(strength=2, layers=[1, 1])], "where": {"phases": ["prompt"]}},
        {"interventions": [add(strength=2, where={"phases": ["prompt"]})]},
        {"interventions": [add(strength=2, site="resid_post")], "where": {"phases": ["prompt"]}},
    ],
)
def test_the_same_meaning_has_the_same_fingerprint(same: dict[str, Any]) -> None:
    assert fingerprint(same) == fingerprint(BASE)


@pytest.mark.parametrize(
    "other",
    [
        {"interventions": [add(strength=2)]},
        {"interventions": [add(strength=-2)], "where": {"phases": ["prompt"]}},
        {"interventions": [add("v1", strength=2)], "where": {"phases": ["prompt"]}},
        {"interventions": [add(strength=2, layers=[2])], "where": {"phases": ["prompt"]}},
        {"interventions": [add(strength=2, site="mlp_out")], "where": {"phases": ["prompt"]}},
        {"interventions": [add(strength={"norm": 2})], "where": {"phases": ["prompt"]}},
        {"interventions": [add(strength=2)] * 2, "where": {"phases": ["prompt"]}},
        {**BASE, "norm": "preserve"},
        {**BASE, "when": {"vector": "v1", "above": 0.5, "layer": 0}},
        {**BASE, "when": {"vector": "v1", "below": 0.5, "layer": 0}},
        {**BASE, "when": {"vector": "v1", "above": 0.5, "layer": 1}},
        {**BASE, "when": {"vector": "v1", "above": 0.5, "layer": 0, "scope": "token"}},
        {**BASE, "when": {"detector": "d0"}},
        {**BASE, "when": {"detector": "d0", "threshold": 0.5}},
        {**BASE, "when": {"detector": "d0", "scope": "token"}},
    ],
)
def test_another_meaning_has_another_fingerprint(other: dict[str, Any]) -> None:
    assert fingerprint(other) != fingerprint(BASE)


def test_a_gate_of_a_detector_is_its_row_bias_and_threshold() -> None:
    detector = artefacts()["detectors"]["d0"]
    plan = cache().plan(parse_spec({**BASE, "when": {"detector": "d0"}}))
    (gate,) = [one.gate for one in plan.rules]
    assert gate is not None
    assert torch.equal(gate.direction, detector.direction)
    assert (gate.above, gate.below, gate.bias) == (detector.threshold, math.inf, detector.bias)
    assert (gate.cosine, gate.prompt_scope, gate.point) == (False, True, detector.point)
    assert plan.summary[0]["when"] == {
        "detector": f"d0@{detector.sha256[:12]}",
        "scope": "prompt",
    }
    assert detector.sha256 in plan.artefacts


def test_a_gate_of_a_detector_that_pools_says_how() -> None:
    when = {"detector": "d3", "scope": "onward"}
    ungated = {**add()["interventions"][0]} if "interventions" in add() else add()
    plan = cache().plan(parse_spec({"interventions": [{**ungated, "when": when}, ungated]}))
    gate = plan.rules[0].gate
    assert gate is not None
    assert (gate.pooling, gate.last, gate.pools) == ("mean", 4, True)
    assert (plan.pooled, plan.graphless) == ((4, 1), True)
    one = cache().plan(parse_spec({**BASE, "when": {"detector": "d0"}}))
    assert (one.pooled, one.graphless) == ((), False)


@pytest.mark.parametrize(
    ("scope", "where", "needed"),
    [
        ("prompt", None, 2),
        ("prompt", {"phases": ["generation"]}, 2),
        ("token", {"positions": [[4, None]]}, 4),
        ("onward", {"phases": ["generation"]}, 6),
    ],
)
def test_what_a_gate_pools_is_needed_though_nothing_is_steered_there(
    scope: str, where: Any, needed: int
) -> None:
    spec = {**BASE, "when": {"detector": "d3", "scope": scope}}
    plan = cache().plan(parse_spec(spec | ({"where": where} if where else {})))
    assert plan.first_needed((9,) * 6, 7) == needed


def test_a_detector_that_comes_to_mean_another_makes_another_plan() -> None:
    spec = parse_spec({**BASE, "when": {"detector": "d"}})
    row = torch.ones(16)
    prints = {
        cache(detectors={"d": Detector.of(row, layer=0, **fields)}).plan(spec).fingerprint
        for fields in ({}, {"bias": 0.1}, {"threshold": 0.1}, {"site": "mlp_out"})
    }
    assert len(prints) == 4


def test_order_is_part_of_the_meaning() -> None:
    one, two = add(strength=2), ablate()
    assert fingerprint({"interventions": [one, two]}) != fingerprint({"interventions": [two, one]})


def test_a_plan_is_compiled_once() -> None:
    plans = cache()
    first = plans.plan(parse_spec(BASE))
    assert plans.plan(parse_spec(BASE)) is first
    assert (plans.stats.hits, plans.stats.misses) == (1, 1)


def test_a_name_that_means_another_version_is_compiled_anew() -> None:
    vectors = {"v": random_vector(1, 1)}
    plans = PlanCache(MemoryLibrary(vectors), shape_of(), EVERYTHING)
    spec = parse_spec({"interventions": [{"kind": "add", "vector": "v"}]})
    before = plans.plan(spec)
    vectors["v"] = random_vector(2, 1)
    after = plans.plan(spec)
    assert after.fingerprint != before.fingerprint
    (block,) = after.rules[0].blocks.values()
    assert block.shift is not None
    assert torch.equal(block.shift, vectors["v"][1])


def test_a_requests_own_vectors_come_first() -> None:
    plans = cache()
    spec = parse_spec({"interventions": [add("v0")]})
    shared = plans.plan(spec)
    mine = plans.plan(spec, vectors={"v0": random_vector(77, 1)})
    assert mine.fingerprint != shared.fingerprint
    assert plans.plan(spec) is shared


def test_the_first_steered_position_is_the_first_of_any_pass() -> None:
    spec = {
        "interventions": [
            add(where={"positions": [[3, None]]}),
            ablate(where={"phases": ["generation"]}),
        ]
    }
    plan = cache().plan(parse_spec(spec))
    assert plan.first_steered((9, 9, 9, 9, 9, 9), 20) == 3
    assert plan.first_steered((9, 9), 20) == 2
    nothing = cache().plan(parse_spec({"interventions": [add(strength=0)]}))
    assert nothing.first_steered((9, 9), 20) is None


NARROW = random_vector(60, 1, width=12)
BAD: dict[str, tuple[dict[str, Any], str, str]] = {
    "unknown vector": (add("nobody"), "unknown_vector", "/interventions/0/vector"),
    "wrong width": (add("narrow"), "wrong_width", "/interventions/0/vector"),
    "layer out of range": (add(layers=[4]), "layer_out_of_range", "/interventions/0/layers"),
    "a card's layer out of range": (
        {"kind": "add", "vector": "deep"},
        "layer_out_of_range",
        "/interventions/0/vector",
    ),
    "layer not in the vector": (
        add("short", layers=[0]),
        "layer_not_in_vector",
        "/interventions/0/layers",
    ),
    "kl": (add(strength={"kl": 0.2}), "not_calibrated", "/interventions/0/strength"),
    "effect": (add(strength={"effect": 0.5}), "not_calibrated", "/interventions/0/strength"),
    "no class mean": (
        {"kind": "project", "vector": "bare", "value": "positive"},
        "not_measured",
        "/interventions/0/value",
    ),
    "gate after the edit": (
        add(when={"vector": "v1", "above": 0.1, "layer": 2}),
        "gate_after_edit",
        "/interventions/0/when",
    ),
    "unknown gate": (
        add(when={"vector": "nobody", "above": 0.1}),
        "unknown_vector",
        "/interventions/0/when/vector",
    ),
    "gate of a wrong width": (
        add(when={"vector": "narrow", "above": 0.1}),
        "wrong_width",
        "/interventions/0/when/vector",
    ),
    "gate layer out of range": (
        add(when={"vector": "v1", "above": 0.1, "layer": 9}),
        "layer_out_of_range",
        "/interventions/0/when/layer",
    ),
    "gate layer not in the vector": (
        add(when={"vector": "short", "above": 0.1, "layer": 0}),
        "layer_not_in_vector",
        "/interventions/0/when/layer",
    ),
    "gate of a detector after the edit": (
        add(when={"detector": "late"}),
        "gate_after_edit",
        "/interventions/0/when",
    ),
    "unknown detector": (
        add(when={"detector": "nobody"}),
        "unknown_detector",
        "/interventions/0/when/detector",
    ),
    "detector of a wrong width": (
        add(when={"detector": "narrow"}),
        "wrong_width",
        "/interventions/0/when/detector",
    ),
    "detector of a layer out of range": (
        add(when={"detector": "deep"}),
        "layer_out_of_range",
        "/interventions/0/when/detector",
    ),
    "unknown SAE": (
        {"kind": "clamp", "sae": "nobody", "features": [1], "value": 1},
        "unknown_sae",
        "/interventions/0/sae",
    ),
    "feature out of range": (
        {"kind": "clamp", "sae": "topk", "features": [1, 64], "value": 1},
        "feature_out_of_range",
        "/interventions/0/features",
    ),
    "not the SAE's layer": (
        {"kind": "clamp", "sae": "topk", "features": [1], "value": 1, "layers": [2]},
        "not_the_saes_layer",
        "/interventions/0/layers",
    ),
    "unknown adapter": (
        {"kind": "low_rank", "adapter": "nobody"},
        "unknown_low_rank",
        "/interventions/0/adapter",
    ),
    "unknown map": (
        {"kind": "affine", "map": "nobody"},
        "unknown_affine",
        "/interventions/0/map",
    ),
    "a layer that a map has not": (
        {"kind": "affine", "map": "map", "layers": [1], "site": "mlp_act"},
        "wrong_width",
        "/interventions/0/map",
    ),
    "nothing to exchange": (
        {"kind": "exchange", "vector": "v0", "toward": "v0", "layers": [1]},
        "no_plane",
        "/interventions/0/toward",
    ),
    "an exchange that the next layer takes back": (
        {"kind": "exchange", "vector": "v0", "toward": "v1", "mode": "both", "layers": [1, 2]},
        "undoes_itself",
        "/interventions/0/layers",
    ),
    "one on the layers of a card": (
        {"kind": "exchange", "vector": "v0", "toward": "v1", "mode": "both", "strength": 0.51},
        "undoes_itself",
        "/interventions/0/layers",
    ),
    "read and written at different layers": (
        {"kind": "read_write", "read": "v0", "write": "short", "layers": [3]},
        "layer_not_in_vector",
        "/interventions/0/layers",
    ),
    "parallel directions": (
        {"kind": "rotate", "vector": "v0", "toward": "v0", "degrees": 9, "layers": [1]},
        "no_plane",
        "/interventions/0/toward",
    ),
    "token string": (
        add(where={"tokens": ["two words"]}),
        "not_one_token",
        "/interventions/0/where/tokens/0",
    ),
}
ODD = {
    "narrow": NARROW,
    "deep": random_vector(61, 9),
    "short": random_vector(62, 1, 2),
    "bare": random_vector(63, 1, measures={}),
}

ODD_DETECTORS = {
    "narrow": Detector.of(torch.ones(4), layer=0),
    "deep": Detector.of(torch.ones(16), layer=9),
    "late": Detector.of(torch.ones(16), layer=2),
}


def words(text: str) -> list[int]:
    return list(range(len(text.split())))


@pytest.mark.parametrize("name", BAD)
def test_what_is_wrong_is_named_and_pointed_at(name: str) -> None:
    item, code, param = BAD[name]
    plans = cache(vectors=ODD, detectors=ODD_DETECTORS, tokenize=words)
    with pytest.raises(SteerError) as caught:
        plans.plan(parse_spec({"interventions": [item]}))
    assert (caught.value.code, caught.value.param) == (code, param)
    assert [(p.code, p.param) for p in caught.value.problems] == [(code, param)]


def test_all_problems_are_reported_at_once() -> None:
    items = [item for item, _, _ in BAD.values()]
    plans = cache(vectors=ODD, detectors=ODD_DETECTORS, tokenize=words)
    problems = plans.check(parse_spec({"interventions": [add(), *items]}))
    assert [(p.code, p.param) for p in problems] == [
        (code, param.replace("/interventions/0", f"/interventions/{place}", 1))
        for place, (_, code, param) in enumerate(BAD.values(), start=1)
    ]


def test_a_problem_of_the_whole_spec_is_reported_once() -> None:
    spec = {"interventions": [add(), ablate()], "when": {"vector": "nobody", "above": 0.1}}
    (problem,) = cache().check(parse_spec(spec))
    assert problem.param == "/when/vector"
    spec = {"interventions": [add(), ablate()], "where": {"tokens": ["two words"]}}
    (problem,) = cache(tokenize=words).check(parse_spec(spec))
    assert problem.param == "/where/tokens/0"


def test_more_passes_than_there_are_is_refused_when_planning() -> None:
    items = [ablate(f"v{n % 6}") for n in range(9)]
    (problem,) = cache().check(parse_spec({"interventions": items}))
    assert (problem.code, problem.param) == ("too_many_passes", "/interventions")
    assert cache().check(parse_spec({"interventions": items[:8]})) == []


def test_a_kind_the_engine_lacks_is_refused_by_name() -> None:
    few = EVERYTHING.__class__("small", ("add",), EVERYTHING.sites)
    plans = PlanCache(MemoryLibrary(**artefacts()), shape_of(), few)
    (problem,) = plans.check(parse_spec({"interventions": [add(), ablate()]}))
    assert (problem.code, problem.param) == ("unsupported_kind", "/interventions/1/kind")


def test_an_engine_without_a_scope_of_gates_refuses_it_by_name() -> None:
    none = replace(EVERYTHING, gate_scopes=())
    held = PlanCache(MemoryLibrary(**artefacts()), shape_of(), none)
    spec = {"interventions": [add()], "when": {"vector": "v1", "above": 0.1, "layer": 0}}
    with pytest.raises(SteerError, match="no gates of scope 'prompt'") as caught:
        held.plan(parse_spec(spec))
    assert (caught.value.code, caught.value.param) == ("unsupported_gate", "/when")
