"""Calibrated strengths in specs: the number they become, and every use that is refused."""

from __future__ import annotations

import hashlib
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from artefacts import EVERYTHING, calibration, random_vector, random_where, shape_of

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.vllm.front.ticket_issuer import TicketIssuer
from steer.errors import SteerError
from steer.plan.cache import PlanCache
from steer.plan.file import dump_plan, load_plan
from steer.plan.resolve import Policy
from steer.plan.selection import Selection, resolve
from steer.spec import Where, parse_spec

LAST = {"phases": ["prompt"], "positions": [[-1, None]]}


def vector(**fields: Any) -> ControlVector:
    where = Where.model_validate(LAST)
    made = random_vector(0, 0, 1, 2, name="v", default_layers=(1,), default_where=where)
    found = calibration(**{"where": where, **fields})
    return replace(made, card=made.card.model_copy(update={"calibration": found}))


def cache(limit: Any = "off", **fields: Any) -> PlanCache:
    library = MemoryLibrary({"v": vector(**fields), "plain": random_vector(1, 1, name="plain")})
    return PlanCache(library, shape_of(), EVERYTHING, policy=Policy(strength_limit=limit))


def spec(strength: Any, **fields: Any) -> dict[str, Any]:
    item = {"kind": "add", "vector": "v", **fields}
    return {"interventions": [item if strength is None else {**item, "strength": strength}]}


@pytest.mark.parametrize(
    ("asked", "number"),
    [({"kl": 0.1}, 1.0), ({"effect": 0.25}, 1.0), ({"effect": 0.625}, 1.5), ("auto", 1 + 13 / 15)],
)
def test_it_means_the_number_it_becomes(asked: Any, number: float) -> None:
    plans = cache()
    found = plans.plan(parse_spec(spec(asked)))
    [entry] = found.describe()["interventions"]
    assert entry["requested"] == asked
    assert entry["strength"] == pytest.approx(number)
    assert found.strengths == (entry["strength"],)
    assert found.resolved_strengths == (
        {"intervention": 0, "requested": asked, "strength": entry["strength"], "capped": False},
    )
    plain = plans.plan(parse_spec(spec(entry["strength"])))
    assert plain.fingerprint == found.fingerprint
    assert plain.resolved_strengths == ()


def test_a_plan_file_says_what_was_asked_for() -> None:
    found = cache().plan(parse_spec(spec({"kl": 0.1})))
    read = load_plan(dump_plan(found), no_encoder)
    assert read.resolved_strengths == found.resolved_strengths
    assert (read.fingerprint, read.spec) == (found.fingerprint, found.spec)


def test_on_vllm_each_request_tells_its_own_strength() -> None:
    """Workers make the receipt from the plan's file, so it may not be that of another request."""
    files: dict[str, bytes] = {}

    class Store:
        def put(self, data: bytes) -> str:
            name = hashlib.sha256(data).hexdigest()
            files[name] = data
            return name

    plans, issuer = cache(), TicketIssuer(Store())  # type: ignore[arg-type]
    found = [plans.plan(parse_spec(spec(strength))) for strength in (1.0, {"kl": 0.1}, 1.0)]
    tickets = [issuer.issue(plan) for plan in found]
    assert len({ticket.fingerprint for ticket in tickets}) == 1
    assert len(files) == 2
    for plan, ticket in zip(found, tickets, strict=True):
        read = load_plan(files[ticket.plan or ""], no_encoder)
        assert read.resolved_strengths == plan.resolved_strengths


def no_encoder(sha256: str) -> Any:
    raise AssertionError("no SAE is in this plan")


def test_no_effect_is_no_edit() -> None:
    assert cache().plan(parse_spec(spec({"effect": 0.0}))).rules == ()


@pytest.mark.parametrize(
    ("changed", "fields", "code", "param"),
    [
        ({}, {"strength": {"kl": 0.5}}, "outside_calibration", "/strength"),
        ({}, {"strength": {"effect": 1.5}}, "outside_calibration", "/strength"),
        ({}, {"layers": [2]}, "not_calibrated", "/layers"),
        ({}, {"layers": "all"}, "not_calibrated", "/layers"),
        ({}, {"site": "mlp_out"}, "not_calibrated", "/vector"),
        ({}, {"where": {"phases": ["prompt"]}}, "not_calibrated", "/strength"),
        ({"model": "another"}, {}, "not_calibrated", "/vector"),
        ({"layers": (0,)}, {}, "not_calibrated", "/vector"),
        ({"where": None}, {}, "not_calibrated", "/strength"),
        ({}, {"vector": "plain"}, "not_calibrated", "/strength"),
    ],
)
def test_another_use_is_refused(
    changed: dict[str, Any], fields: dict[str, Any], code: str, param: str
) -> None:
    asked = spec(**{"strength": {"kl": 0.1}, **fields})
    with pytest.raises(SteerError) as caught:
        cache(**changed).plan(parse_spec(asked))
    assert (caught.value.code, caught.value.param) == (code, "/interventions/0" + param)


@pytest.mark.parametrize("served_as", ["prod", "org/prod"])
def test_a_model_served_under_another_name_keeps_its_calibrations(served_as: str) -> None:
    made_on = calibration().model
    for origin in (made_on, f"/models/{made_on}", f"org/{made_on}"):
        served = replace(shape_of(), name=origin).served_as(served_as)
        library = MemoryLibrary({"v": vector()})
        assert PlanCache(library, served, EVERYTHING).plan(parse_spec(spec({"kl": 0.1}))).rules
    stranger = replace(shape_of(), name="/models/stranger").served_as(served_as)
    with pytest.raises(SteerError) as caught:
        PlanCache(MemoryLibrary({"v": vector()}), stranger, EVERYTHING).plan(
            parse_spec(spec({"kl": 0.1}))
        )
    assert "/models/" not in caught.value.message


@pytest.mark.parametrize("whole", [{"norm": "preserve"}, {"where": {"phases": ["generation"]}}])
def test_what_the_whole_spec_says_counts_too(whole: dict[str, Any]) -> None:
    with pytest.raises(SteerError) as caught:
        cache().plan(parse_spec({**spec("auto"), **whole}))
    assert caught.value.code == "not_calibrated"


def test_a_vector_that_composition_changes_is_not_the_one_that_was_calibrated() -> None:
    asked = spec("auto", layers=[1])
    other = {**asked["interventions"][0], "vector": "plain", "strength": 1.0}
    both = {"interventions": [other, *asked["interventions"]]}
    assert cache().plan(parse_spec(both)).resolved_strengths
    with pytest.raises(SteerError, match="compose") as caught:
        cache().plan(parse_spec({**both, "compose": "orthogonal"}))
    assert caught.value.code == "not_calibrated"


def test_the_same_use_said_outright_is_the_same() -> None:
    plans = cache(model="org/tiny")
    outright = spec("auto", layers=[1], site="resid_post", where=LAST)
    assert plans.plan(parse_spec(outright)).fingerprint == (
        plans.plan(parse_spec(spec("auto"))).fingerprint
    )


def test_without_a_limit_any_number_goes() -> None:
    plans = cache()
    for strength in (-1, 3, 50, {"norm": 0.3}):
        assert plans.plan(parse_spec(spec(strength, layers=[2]))).resolved_strengths == ()


@pytest.mark.parametrize("strength", [2.001, -0.1, 50, {"norm": 0.3}])
def test_a_limit_can_refuse(strength: Any) -> None:
    plans = cache("refuse")
    with pytest.raises(SteerError, match="0 to 2") as caught:
        plans.plan(parse_spec(spec(strength)))
    assert caught.value.code == "outside_calibration"
    assert caught.value.param == "/interventions/0/strength"


@pytest.mark.parametrize(("strength", "capped"), [(2.001, 2.0), (50, 2.0), (-0.1, 0.0)])
def test_a_limit_can_cap(strength: float, capped: float) -> None:
    plans = cache("cap")
    found = plans.plan(parse_spec(spec(strength)))
    assert found.resolved_strengths == (
        {"intervention": 0, "requested": strength, "strength": capped, "capped": True},
    )
    assert found.fingerprint == plans.plan(parse_spec(spec(capped))).fingerprint


@pytest.mark.parametrize("limit", ["refuse", "cap"])
def test_a_limit_holds_a_vector_to_its_calibrated_use(limit: str) -> None:
    plans = cache(limit)
    assert plans.plan(parse_spec(spec(1.5))).strengths == (1.5,)
    assert plans.plan(parse_spec(spec(None))).strengths == (1.0,)
    assert plans.plan(parse_spec(spec("auto"))).resolved_strengths
    with pytest.raises(SteerError) as caught:
        plans.plan(parse_spec(spec(1.0, layers=[2])))
    assert caught.value.code == "not_calibrated"
    # What was never calibrated has no range.
    assert plans.plan(parse_spec(spec(50, vector="plain"))).strengths == (50,)


@pytest.mark.parametrize("seed", range(200))
def test_an_anchored_selection_selects_the_same(seed: int) -> None:
    draw = random.Random(seed)
    drawn = random_where(draw)
    selection = resolve(None if drawn is None else Where.model_validate(drawn))
    if draw.random() < 0.3:
        selection = replace(selection, from_last_prompt_token=True)
    prompt, length = draw.randint(1, 8), draw.randint(8, 14)
    positions = np.arange(length)
    ids = np.array([draw.randrange(64) for _ in range(length)])
    wanted = selection.mask(positions, prompt, ids)
    anchored = selection.anchored(prompt)
    for read_as in range(prompt, length + 1):
        assert (anchored.mask(positions, read_as, ids) == wanted).all()


def test_phases_and_negative_ranges_are_anchored() -> None:
    generation = Selection(phases=frozenset({"generation"})).anchored(5)
    assert generation.ranges == ((5, None),)
    last = Selection(phases=frozenset({"prompt"}), ranges=((-1, None),)).anchored(5)
    assert last.ranges == ((4, 5),)
    nothing = Selection(phases=frozenset({"prompt"}), ranges=((7, 9),)).anchored(5)
    assert not nothing.mask(np.arange(12), 12, np.zeros(12, dtype=np.int64)).any()


@pytest.mark.parametrize("asked", [{"kl": 0.1}, {"effect": 0.25}, "auto"])
def test_a_calibrated_strength_says_nothing_under_a_ramp(asked: Any) -> None:
    """It was measured at one strength on all tokens; the ramp is what is at fault, wherever it
    stands."""
    ramp = [[0, 0.0], [8, 1.0]]
    for made, param in (
        (spec(asked, ramp=ramp), "/interventions/0/ramp"),
        ({**spec(asked), "ramp": ramp}, "/ramp"),
    ):
        with pytest.raises(SteerError) as caught:
            cache().plan(parse_spec(made))
        assert (caught.value.code, caught.value.param) == ("not_calibrated", param)
    assert cache().plan(parse_spec(spec(asked, ramp=[[0, 1]]))).rules


def test_a_limit_holds_for_the_most_that_a_ramp_lets_a_token_have() -> None:
    most = calibration().safe_strength
    half = [[0, 0.0], [8, 0.5]]
    allowed = cache("cap").plan(parse_spec(spec(2 * most, ramp=half)))
    assert allowed.strengths == (2 * most,)
    assert allowed.resolved_strengths == ()
    capped = cache("cap").plan(parse_spec(spec(3 * most, ramp=half)))
    assert capped.strengths == pytest.approx((2 * most,))
    assert capped.resolved_strengths[0]["capped"] is True
    with pytest.raises(SteerError) as caught:
        cache("refuse").plan(parse_spec(spec(3 * most, ramp=half)))
    assert (caught.value.code, caught.value.param) == (
        "outside_calibration",
        "/interventions/0/strength",
    )
