"""The spec as JSON: what is accepted, what is refused and where the refusal points."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from steer.errors import SpecError
from steer.spec import KINDS, SteeringSpec, Where, parse_spec

ROOT = Path(__file__).parents[2]
ADD: dict[str, Any] = {"kind": "add", "vector": "v"}


def one(**fields: Any) -> dict[str, Any]:
    return {"interventions": [ADD | fields]}


def refusal(value: Any, at: str = "") -> SpecError:
    with pytest.raises(SpecError) as caught:
        parse_spec(value, at=at)
    return caught.value


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no interventions": ({"interventions": []}, "/interventions"),
    "10,000 interventions": ({"interventions": [ADD] * 10_000}, "/interventions"),
    "unknown field": (one(strenght=1), "/interventions/0/strenght"),
    "unknown field of the spec": ({**one(), "extra": 1}, "/extra"),
    "unknown kind": ({"interventions": [{"kind": "push"}]}, "/interventions/0"),
    "no kind": ({"interventions": [{"vector": "v"}]}, "/interventions/0"),
    "no vector": ({"interventions": [{"kind": "add"}]}, "/interventions/0/vector"),
    "a name with slashes": (one(vector="../../etc/passwd"), "/interventions/0/vector"),
    "strength is NaN": (one(strength=float("nan")), "/interventions/0/strength"),
    "strength is infinite": (one(strength=float("inf")), "/interventions/0/strength"),
    "strength is text": (one(strength="2"), "/interventions/0/strength"),
    "strength is a boolean": (one(strength=True), "/interventions/0/strength"),
    "strength in an unknown unit": (one(strength={"db": 3}), "/interventions/0/strength"),
    "strength in two units": (one(strength={"kl": 1, "norm": 1}), "/interventions/0/strength"),
    "norm is infinite": (one(strength={"norm": float("inf")}), "/interventions/0/strength/norm"),
    "negative layer": (one(layers=[-1]), "/interventions/0/layers/0"),
    "no layers": (one(layers=[]), "/interventions/0/layers"),
    "unknown site": (one(site="logits"), "/interventions/0/site"),
    "unknown phase": (one(where={"phases": ["decode"]}), "/interventions/0/where/phases/0"),
    "a position alone": (one(where={"positions": [-1]}), "/interventions/0/where/positions/0"),
    "a row alone": (one(vector=[0.1, 0.2]), "/interventions/0/vector"),
    "a row as base64": (one(vector={"data": [0.1], "layer": 1}), "/interventions/0/vector/data"),
    "empty where": (one(where={"phases": []}), "/interventions/0/where/phases"),
    "empty range": (one(where={"positions": [[5, 5]]}), "/interventions/0/where"),
    "range of one": (one(where={"positions": [[5]]}), "/interventions/0/where/positions/0/1"),
    "except in except": (
        one(where={"except": {"except": {"tokens": [1]}}}),
        "/interventions/0/where",
    ),
    "unknown role": (one(where={"roles": ["bot"]}), "/interventions/0/where/roles/0"),
    "no texts": ({**one(), "where": {"after": []}}, "/where/after"),
    "an empty text": ({**one(), "where": {"before": [""]}}, "/where/before/0"),
    "a text that is a number": ({**one(), "where": {"after": [5]}}, "/where/after/0"),
    "token ids below 0": ({**one(), "where": {"after": [[3, -1]]}}, "/where/after/0/1"),
    "an opening alone": ({**one(), "where": {"between": [["a"]]}}, "/where/between/0/1"),
    "a closing alone": ({**one(), "where": {"outside": [[None, "a"]]}}, "/where/outside/0/0"),
    "an empty schedule": ({**one(), "where": {"every": {}}}, "/where/every"),
    "every 0th": ({**one(), "where": {"every": {"nth": 0}}}, "/where/every/nth"),
    "an unknown schedule": ({**one(), "where": {"every": {"last": 3}}}, "/where/every/last"),
    "a long text": ({**one(), "where": {"after": ["a" * 65]}}, "/where/after/0"),
    "too many texts of a field": ({**one(), "where": {"after": ["a"] * 17}}, "/where/after"),
    "a ramp that is no list": (one(ramp={"from": 0}), "/interventions/0/ramp"),
    "a ramp without points": ({**one(), "ramp": []}, "/ramp"),
    "a ramp of too many points": (one(ramp=[[n, 1] for n in range(65)]), "/interventions/0/ramp"),
    "a ramp that turns back": (one(ramp=[[8, 0], [2, 1]]), "/interventions/0/ramp"),
    "a ramp with a token twice": (one(ramp=[[8, 0], [8, 1]]), "/interventions/0/ramp"),
    "a ramp from before the answer": (one(ramp=[[-1, 0]]), "/interventions/0/ramp/0/0"),
    "a ramp above 1": (one(ramp=[[0, 0], [4, 1.5]]), "/interventions/0/ramp/1/1"),
    "a ramp below 0": (one(ramp=[[0, -0.5]]), "/interventions/0/ramp/0/1"),
    "a ramp that is NaN": (one(ramp=[[0, float("nan")]]), "/interventions/0/ramp/0/1"),
    "a point of one number": (one(ramp=[[3]]), "/interventions/0/ramp/0/1"),
    "a ramp in the place of a strength": (
        one(strength={"ramp": [[0, 1]]}),
        "/interventions/0/strength",
    ),
    "gate without bounds": (one(when={"vector": "g"}), "/interventions/0/when"),
    "gate of nothing": (one(when={}), "/interventions/0/when/vector"),
    "gate of a detector with bounds": (
        one(when={"detector": "d", "above": 1.0}),
        "/interventions/0/when/above",
    ),
    "gate of a detector and a vector": (
        {**one(), "when": {"detector": "d", "vector": "g"}},
        "/when/vector",
    ),
    "gate of a detector that is no name": (
        one(when={"detector": "a/b"}),
        "/interventions/0/when/detector",
    ),
    "gate of a detector above a text": (
        one(when={"detector": "d", "threshold": "2"}),
        "/interventions/0/when/threshold",
    ),
    "gate that never opens": (
        one(when={"vector": "g", "above": 1, "below": 0}),
        "/interventions/0/when",
    ),
    "feature twice": (
        {"interventions": [{"kind": "clamp", "sae": "s", "features": [1, 1], "value": 1}]},
        "/interventions/0",
    ),
    "values for other features": (
        {"interventions": [{"kind": "clamp", "sae": "s", "features": [1], "value": [1, 2]}]},
        "/interventions/0",
    ),
    "norm": ({**one(), "norm": "keep"}, "/norm"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_malformed_is_refused_and_pointed_at(name: str) -> None:
    value, param = BAD[name]
    error = refusal(value)
    assert error.param == param
    assert error.status == 400
    assert error.message


def test_pointers_start_where_the_spec_stands() -> None:
    assert refusal(one(site="x"), at="/steering").param == "/steering/interventions/0/site"


def test_every_problem_is_reported() -> None:
    error = refusal({"interventions": [ADD | {"site": "x", "layers": [-1]}], "norm": "y"})
    assert {p.param for p in error.problems} == {
        "/interventions/0/site",
        "/interventions/0/layers/0",
        "/norm",
    }


def test_the_fingerprint_is_of_the_meaning_as_written() -> None:
    base = parse_spec(one(strength=2, layers=[2, 1])).fingerprint()
    assert len(base) == 32
    assert parse_spec(one(layers=[1, 2, 2], strength=2.0)).fingerprint() == base
    assert parse_spec(one(strength=2, layers=[1, 2], site=None)).fingerprint() == base
    assert parse_spec(one(strength=2.5, layers=[1, 2])).fingerprint() != base
    assert (
        parse_spec(one(strength=0.0)).fingerprint() == parse_spec(one(strength=-0.0)).fingerprint()
    )


def test_a_spec_survives_json() -> None:
    spec = parse_spec(
        {
            **one(
                strength={"norm": 0.2}, where={"positions": [[-1, None]], "except": {"tokens": [3]}}
            ),
            "when": {"vector": "g", "above": 0.4},
        }
    )
    again = parse_spec(json.loads(spec.model_dump_json(by_alias=True, exclude_none=True)))
    assert again == spec
    assert again.fingerprint() == spec.fingerprint()


def test_the_documented_schema_is_the_one_in_use() -> None:
    """Written by `SteeringSpec.model_json_schema()`; write it again when the spec changes."""
    stored = json.loads((ROOT / "docs" / "spec.schema.json").read_text())
    assert stored == SteeringSpec.model_json_schema(by_alias=True)


def test_the_schema_names_every_kind() -> None:
    schema = SteeringSpec.model_json_schema(by_alias=True)
    mapping = schema["properties"]["interventions"]["items"]["discriminator"]["mapping"]
    assert set(mapping) == set(KINDS)


def test_a_copy_has_nothing_that_was_worked_out_of_the_old_fields() -> None:
    spec = parse_spec({"interventions": [{"kind": "add", "vector": "v"}]})
    known = spec.fingerprint(), list(spec.references())
    other = parse_spec({"interventions": [{"kind": "add", "vector": "w"}]})
    copied = spec.model_copy(update={"interventions": other.interventions})
    assert copied.fingerprint() == other.fingerprint() != known[0]
    assert list(copied.references()) == list(other.references()) != known[1]
    assert spec.model_copy() == spec == copied.model_copy(update=dict(spec))


def test_selections_of_older_specs_are_written_as_they_were() -> None:
    """A card holds one, and its file is known by its hash."""
    fields = Where(phases=("prompt",)).model_dump(by_alias=True)
    assert fields.keys() == {"phases", "positions", "tokens", "except"}


@pytest.mark.parametrize(
    ("mine", "theirs", "both"),
    [
        ({"after": ["a"]}, {"after": ["b"]}, {"after": ["a", "b"]}),
        ({"roles": ["user"]}, {"roles": ["tool"]}, {"roles": ["user", "tool"]}),
        ({"before": ["a"]}, {"before": ["b"]}, None),
        ({"outside": [["a", "b"]]}, {"outside": [["b", None]]}, None),
        ({"every": {"nth": 2}}, {"every": {"nth": 3}}, None),
        ({"every": {"nth": 2}}, {"every": {"nth": 2}}, {"every": {"nth": 2}}),
    ],
    ids=str,
)
def test_two_exceptions_make_one_where_a_longer_list_selects_what_either_does(
    mine: dict[str, Any], theirs: dict[str, Any], both: dict[str, Any] | None
) -> None:
    own, default = (Where.model_validate({"except": one}) for one in (mine, theirs))
    if both is None:
        with pytest.raises(SpecError) as caught:
            own.over(default)
        assert caught.value.code == "two_exceptions"
    else:
        assert own.over(default) == Where.model_validate({"except": both})
    assert not own.selects
    assert Where.model_validate(mine).over(default) == Where.model_validate(mine)
