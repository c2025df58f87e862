"""An unknown field of a spec is told what it is a slip of the pen for, wherever it stands."""

from __future__ import annotations

from typing import Any

import pytest

from steer.errors import SpecError
from steer.spec import parse_spec

ADD = {"kind": "add", "vector": "joy"}


@pytest.mark.parametrize(
    ("spec", "at", "said"),
    [
        ({"interventions": [{**ADD, "strenght": 1}]}, "/interventions/0/strenght", "strength"),
        ({"interventions": [{**ADD, "coeff": 1}]}, "/interventions/0/coeff", "strength"),
        ({"interventions": [{**ADD, "multiplier": 1}]}, "/interventions/0/multiplier", "strength"),
        ({"interventions": [{**ADD, "layer": 1}]}, "/interventions/0/layer", "layers"),
        (
            {"interventions": [{**ADD, "target_layers": 1}]},
            "/interventions/0/target_layers",
            "layers",
        ),
        ({"interventions": [{**ADD, "hook_point": 1}]}, "/interventions/0/hook_point", "site"),
        ({"interventions": [{**ADD, "Where": {}}]}, "/interventions/0/Where", "where"),
        (
            {"interventions": [{**ADD, "where": {"position": [[0, 1]]}}]},
            "/interventions/0/where/position",
            "positions",
        ),
        (
            {"interventions": [{**ADD, "where": {"except": {"role": ["user"]}}}]},
            "/interventions/0/where/except/role",
            "roles",
        ),
        (
            {"interventions": [{"kind": "clamp", "sae": "s", "feature": 3, "value": 1}]},
            "/interventions/0/feature",
            "features",
        ),
        ({"interventions": [ADD], "when": {"detector": "a", "scop": 1}}, "/when/scop", "scope"),
        ({"intervention": [ADD]}, "/intervention", "interventions"),
        (
            {"interventions": [ADD], "when": {"vector": "a", "threshold": 1}},
            "/when/threshold",
            "above",
        ),
        (
            {"interventions": [ADD], "when": {"detector": "a", "tresholds": 1}},
            "/when/tresholds",
            "threshold",
        ),
        (
            {"interventions": [{**ADD, "vector": {"vector": [1.0], "layer": 1}}]},
            "/interventions/0/vector/vector",
            "values",
        ),
    ],
)
def test_slips(spec: dict[str, Any], at: str, said: str) -> None:
    with pytest.raises(SpecError) as found:
        parse_spec(spec)
    told = {one.param: one.message for one in found.value.problems}
    assert told[at] == f"unknown field {at.rpartition('/')[2]!r}: the field is {said!r}"


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ({"type": "add", "vector": "joy"}, "'type' is unknown"),
        ({"vector": "joy"}, "an intervention needs a 'kind', one of add"),
        ({"kind": "ADD", "vector": "joy"}, "(did you mean 'add'?)"),
        ({"kind": "caa", "vector": "joy"}, "(did you mean 'add'?)"),
        ({"kind": "projection", "vector": "joy"}, "(did you mean 'project'?)"),
        ({"kind": 3, "vector": "joy"}, "3 is not a kind"),
        ({**ADD, "layers": 7}, "write [7]"),
        ({**ADD, "layers": "7-12"}, "a list is needed, or 'all'"),
    ],
)
def test_kinds_and_layers_that_are_nearly_right(item: dict[str, Any], said: str) -> None:
    with pytest.raises(SpecError) as found:
        parse_spec({"interventions": [item]})
    assert said in found.value.problems[0].message


def test_one_that_is_no_slip_is_told_the_fields_of_its_kind_alone() -> None:
    with pytest.raises(SpecError, match="hovercraft") as found:
        parse_spec({"interventions": [{**ADD, "hovercraft": 1}]})
    message = found.value.problems[0].message
    assert message.endswith(
        "remove it; the fields here are kind, layers, ramp, site, strength, vector, when, where"
    )
