"""What a plan is made of: looked up once, one state of each name, and what a policy allows."""

from __future__ import annotations

import base64
from collections import Counter
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch
from artefacts import (
    EVERYTHING,
    artefacts,
    calibration,
    random_adapter,
    random_map,
    random_sae,
    random_vector,
    shape_of,
    span_vocabulary,
)

from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.lens import Lens
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.oracle import Oracle
from steer.artefacts.sae.base import SAE
from steer.edits import Block
from steer.errors import SteerError, UnknownArtefact, Unsupported
from steer.plan import kinds
from steer.plan.cache import PlanCache
from steer.plan.kinds import Blocks
from steer.plan.plan import SteeringPlan
from steer.plan.points import row
from steer.plan.resolve import Policy, Resolved
from steer.plan.selection import resolve
from steer.spec import (
    KINDS,
    SAERef,
    Schedule,
    SteeringSpec,
    VectorRef,
    Where,
    _Intervention,
    parse_spec,
)

INLINE = {"data": base64.b64encode(random_vector(7, 1).to_bytes()).decode(), "layer": 1}


def version(name: str, number: int) -> ControlVector:
    return random_vector(100 * ord(name[0]) + number, 0, 1, name=name)


class Restless:
    """A library in which a name means another version each time it is asked for; it counts."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()

    def vector(self, ref: str) -> ControlVector:
        return version(ref, self._count(ref))

    def sae(self, ref: str) -> SAE:
        return random_sae("topk", seed=self._count(ref))

    def low_rank(self, ref: str) -> LowRankAdapter:
        return random_adapter(self._count(ref), 1)

    def oracle(self, ref: str) -> Oracle:
        raise UnknownArtefact(ref)

    def affine(self, ref: str) -> AffineMap:
        return random_map(self._count(ref), 1)

    def lens(self, ref: str) -> Lens:
        raise UnknownArtefact(ref)

    def _count(self, ref: str) -> int:
        self.asked[ref] += 1
        return self.asked[ref]


ADD = {"kind": "add", "vector": "a", "layers": [1]}
EVERY_WAY = {
    "interventions": [
        ADD,
        {**ADD, "strength": {"norm": 0.1}},
        {"kind": "swap", "remove": "a", "add": "b", "layers": [1]},
        {"kind": "rotate", "vector": "b", "toward": "a", "degrees": 9, "layers": [1]},
        {"kind": "clamp", "sae": "s", "features": [1], "value": 1.0},
        {"kind": "low_rank", "adapter": "lora", "layers": [1]},
        {"kind": "affine", "map": "calm", "layers": [1]},
        {"kind": "read_write", "read": "b", "write": "a", "layers": [1]},
        {"kind": "exchange", "vector": "a", "toward": "b", "layers": [1]},
        {**ADD, "when": {"vector": "a", "below": 0.5, "layer": 0}},
    ],
    "when": {"vector": "gate", "above": 0.1, "layer": 0},
}


def test_a_name_is_looked_up_once_and_means_one_thing_in_one_plan() -> None:
    library = Restless()
    plan = PlanCache(library, shape_of(), EVERYTHING).plan(parse_spec(EVERY_WAY))
    assert library.asked == dict.fromkeys(("a", "b", "s", "lora", "calm", "gate"), 1)
    assert version("a", 1).sha256 in plan.artefacts
    assert version("a", 2).sha256 not in plan.artefacts
    composed = {"interventions": [ADD, {**ADD, "vector": "b"}], "compose": "orthogonal"}
    again = Restless()
    PlanCache(again, shape_of(), EVERYTHING).plan(parse_spec(composed))
    assert again.asked == dict.fromkeys(("a", "b"), 1)


def test_a_plan_is_kept_under_what_it_was_made_of() -> None:
    """Between the key and the compiling, a name could come to mean something else."""
    library = Restless()
    plans = PlanCache(library, shape_of(), EVERYTHING)
    spec = parse_spec({"interventions": [ADD]})
    first = plans.plan(spec)
    library.asked["a"] = 0  # the name means the first version again
    assert plans.plan(spec) is first
    assert plans.plan(spec).fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("spec", "param"),
    [
        ({"interventions": [{**ADD, "vector": INLINE}]}, "/interventions/0/vector"),
        (
            {"interventions": [{"kind": "swap", "remove": "a", "add": INLINE, "layers": [1]}]},
            "/interventions/0/add",
        ),
        (
            {"interventions": [{**ADD, "when": {"vector": INLINE, "above": 0.1}}]},
            "/interventions/0/when/vector",
        ),
        ({"interventions": [ADD], "when": {"vector": INLINE, "above": 0.1}}, "/when/vector"),
    ],
)
def test_vectors_in_specs_can_be_forbidden(spec: dict[str, Any], param: str) -> None:
    library = Restless()
    plans = PlanCache(library, shape_of(), EVERYTHING, policy=Policy(inline_vectors=False))
    with pytest.raises(Unsupported, match="takes no vectors inside requests") as caught:
        plans.plan(parse_spec(spec))
    assert (caught.value.code, caught.value.param) == ("inline_vectors_disabled", param)
    assert PlanCache(library, shape_of(), EVERYTHING).plan(parse_spec(spec)).rules
    plans.plan(parse_spec({"interventions": [ADD]}))


def test_what_is_forbidden_is_never_read() -> None:
    broken = {"interventions": [{**ADD, "vector": {"data": "!"}}]}
    plans = PlanCache(Restless(), shape_of(), EVERYTHING, policy=Policy(inline_vectors=False))
    assert [p.code for p in plans.check(parse_spec(broken))] == ["inline_vectors_disabled"]


def test_a_wrong_gate_of_the_whole_spec_hides_nothing() -> None:
    spec = {
        "interventions": [
            {"kind": "clamp", "sae": "topk", "features": [64], "value": 1},
            {"kind": "add", "vector": "v0", "strength": "auto", "layers": [1]},
            {"kind": "ablate", "vector": "v0", "layers": [1]},
        ],
        "when": {"vector": "nobody", "above": 0.1},
    }
    plans = PlanCache(MemoryLibrary(**artefacts()), shape_of(), EVERYTHING)
    assert [(p.code, p.param) for p in plans.check(parse_spec(spec))] == [
        ("feature_out_of_range", "/interventions/0/features"),
        ("not_calibrated", "/interventions/1/strength"),
        ("unknown_vector", "/when/vector"),
    ]


def test_unknown_tokens_are_no_other_use_of_a_calibration() -> None:
    made = random_vector(0, 1, name="v")
    card = made.card.model_copy(update={"calibration": calibration()})
    library = MemoryLibrary({"v": ControlVector(made.directions, card)})
    plans = PlanCache(library, shape_of(), EVERYTHING, tokenize=lambda text: [1, 2])
    item = {"kind": "add", "vector": "v", "strength": "auto", "where": {"tokens": ["two words"]}}
    (problem,) = plans.check(parse_spec({"interventions": [item]}))
    assert (problem.code, problem.param) == ("not_one_token", "/interventions/0/where/tokens/0")


def test_every_kind_of_a_spec_has_its_blocks() -> None:
    assert set(kinds._KINDS) == set(KINDS)


class Graft(_Intervention):
    """A kind that no other module knows."""

    kind: Literal["graft"] = "graft"
    onto: VectorRef
    basis: SAERef


class Garden(SteeringSpec):
    interventions: tuple[Graft, ...]  # type: ignore[assignment]


def graft(item: Graft, one: Resolved) -> Blocks:
    decoder = one.sae("basis").writes([0])[0]
    return {p: Block(shift=row(one.vector("onto"), p.layer) + decoder) for p in one.points}


def test_a_kind_is_its_model_and_its_function(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kinds, "_KINDS", {"graft": graft})
    made = artefacts()
    able = EVERYTHING.__class__("test", ("graft",), EVERYTHING.sites)
    plans = PlanCache(MemoryLibrary(**made), shape_of(), able, policy=Policy(inline_vectors=False))
    item = {"kind": "graft", "onto": "v1", "basis": "topk", "layers": [2]}
    spec = Garden.model_validate({"interventions": [item]})
    plan = plans.plan(spec)
    vector, sae = made["vectors"]["v1"], made["saes"]["topk"]
    assert plan.artefacts == (vector.sha256, sae.sha256)
    assert plan.summary == (
        {
            "kind": "graft",
            "onto": f"inline@{vector.sha256[:12]}",
            "basis": f"topk@{sae.sha256[:12]}",
            "hook_points": ["2.resid_post"],
        },
    )
    (block,) = plan.rules[0].blocks.values()
    assert block.shift is not None
    assert torch.equal(block.shift, vector[2] + sae.writes([0])[0])
    made["saes"]["topk"] = random_sae("topk", seed=99)
    assert plans.plan(spec).fingerprint != plan.fingerprint
    carried = Garden.model_validate({"interventions": [{**item, "onto": INLINE}]})
    with pytest.raises(SteerError) as caught:
        plans.plan(carried)
    assert caught.value.param == "/interventions/0/onto"
    missing = Garden.model_validate({"interventions": [{**item, "basis": "nobody"}]})
    assert [p.param for p in plans.check(missing)] == ["/interventions/0/basis"]


LAST: dict[str, Any] = {"phases": ["prompt"], "positions": [[-1, None]]}


@pytest.mark.parametrize(
    ("card", "of_spec", "own", "means"),
    [
        (LAST, None, {"except": {"tokens": [7]}}, {**LAST, "except": {"tokens": [7]}}),
        (LAST, {"except": {"tokens": [7]}}, None, {**LAST, "except": {"tokens": [7]}}),
        (LAST, {"except": {"tokens": [7]}}, {}, {**LAST, "except": {"tokens": [7]}}),
        (LAST, {}, {}, LAST),
        (LAST, {"phases": ["generation"]}, None, {"phases": ["generation"]}),
        (LAST, {"positions": [[0, 4]]}, {"except": {"tokens": [7]}},
         {"positions": [[0, 4]], "except": {"tokens": [7]}}),
        (LAST, {"except": {"tokens": [7]}}, {"except": {"tokens": [8, 7]}},
         {**LAST, "except": {"tokens": [8, 7]}}),
        (LAST, {"except": {"tokens": [7]}}, {"tokens": [8]}, {"tokens": [8]}),
        ({**LAST, "except": {"positions": [[0, 1]]}}, None, {"except": {"positions": [[4, 5]]}},
         {**LAST, "except": {"positions": [[4, 5], [0, 1]]}}),
        (None, None, {"except": {"tokens": [7]}}, {"except": {"tokens": [7]}}),
    ],
)  # fmt: skip
def test_a_where_that_only_excepts_narrows_what_holds_without_it(
    card: Any, of_spec: Any, own: Any, means: Any
) -> None:
    where = None if card is None else Where.model_validate(card)
    library = MemoryLibrary({"v": random_vector(0, 1, name="v", default_where=where)})
    item = {"kind": "add", "vector": "v", "strength": 1.0, "where": own}
    plans = PlanCache(library, shape_of(), EVERYTHING)
    plan = plans.plan(parse_spec({"interventions": [item], "where": of_spec}))
    assert plan.rules[0].selection == resolve(Where.model_validate(means))
    assert plan.summary[0]["where"] == Where.model_validate(means).model_dump(
        mode="json", by_alias=True, exclude_none=True
    )


def test_cards_are_narrowed_each_for_itself() -> None:
    """One spec, two cards, and an `except` for both."""
    cards = {"a": Where(phases=("prompt",)), "b": Where(phases=("generation",))}
    library = MemoryLibrary(
        {name: random_vector(0, 1, name=name, default_where=where) for name, where in cards.items()}
    )
    items = [{"kind": "add", "vector": name, "strength": 1.0} for name in cards]
    spec = parse_spec({"interventions": items, "where": {"except": {"tokens": [7]}}})
    plan = PlanCache(library, shape_of(), EVERYTHING).plan(spec)
    assert [one.selection.phases for one in plan.rules] == [{"prompt"}, {"generation"}]
    assert all(one.selection.excluded is not None for one in plan.rules)


def test_two_exceptions_that_do_not_make_one_are_refused() -> None:
    where = Where(phases=("prompt",), except_=Where(tokens=(1,)))
    library = MemoryLibrary({"v": random_vector(0, 1, name="v", default_where=where)})
    item = {"kind": "add", "vector": "v", "where": {"except": {"positions": [[0, 1]]}}}
    with pytest.raises(SteerError, match="whole 'where'") as caught:
        PlanCache(library, shape_of(), EVERYTHING).plan(parse_spec({"interventions": [item]}))
    assert (caught.value.code, caught.value.param) == (
        "two_exceptions",
        "/interventions/0/where/except",
    )


def test_a_spec_looks_for_few_texts_those_of_its_cards_included() -> None:
    """Each is followed token by token."""

    def compiled(count: int) -> SteeringPlan:
        wheres = [Where(after=(f"{n}a", "b"), every=Schedule(first=9)) for n in range(count)]
        cards = {
            f"v{n}": random_vector(n, 1, name=f"v{n}", default_where=where)
            for n, where in enumerate(wheres)
        }
        items: list[dict[str, Any]] = [{"kind": "add", "vector": name} for name in cards]
        for n, item in enumerate(items[:5]):
            item["where"] = {"except": {"outside": [[f"{n}", None]]}}
        able = replace(EVERYTHING, limits={})
        cache = PlanCache(MemoryLibrary(cards), shape_of(), able, vocabulary=span_vocabulary)
        return cache.plan(parse_spec({"interventions": items}))

    assert len({one for each in compiled(26).selections for one in each.automata}) == 32
    with pytest.raises(SteerError) as caught:
        compiled(27)
    assert caught.value.code == "too_many_texts"
    assert caught.value.param == "/interventions/26/vector"
