"""A vector may be said as a token of a lens, wherever a vector stands."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from artefacts import EVERYTHING, random_jacobians, random_lens, random_sae, random_vector, shape_of
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.token_direction import token_vector
from steer.errors import SpecError, SteerError, Unsupported
from steer.plan.cache import PlanCache
from steer.plan.file import dump_plan, load_plan
from steer.plan.plan import SteeringPlan
from steer.plan.resolve import Policy
from steer.references import Reference
from steer.registry.profiles import Profile, pinned
from steer.spec import TokenVector, parse_spec

MODEL = shape_of()
LENSES = {"tuned": random_lens(1, 4), "jacobian": random_jacobians(2, 4)}
IDS = {" Paris": 5, " Rome": 9}
PARIS: dict[str, Any] = {"token": " Paris", "lens": "tuned"}
ROME: dict[str, Any] = {"token": 9, "lens": "tuned"}


def row(token: int) -> Tensor:
    return torch.randn(16, generator=torch.Generator().manual_seed(token))


def read(token: int | str) -> tuple[int, Tensor]:
    number = IDS[token] if isinstance(token, str) else token
    return number, torch.zeros(16) if number == 0 else row(number)


def stored(token: int, lens: str | None, site: Any = "resid_post") -> ControlVector:
    return token_vector(token, row(token), LENSES.get(lens or ""), site, MODEL)


def cache(vectors: dict[str, ControlVector] | None = None, **options: Any) -> PlanCache:
    library = MemoryLibrary(
        {"v": random_vector(0, *range(4), name="v"), **(vectors or {})}, lenses=LENSES
    )
    return PlanCache(library, MODEL, EVERYTHING, **{"read_token": read, **options})


def plan(item: dict[str, Any], **rest: Any) -> SteeringPlan:
    return cache().plan(parse_spec({"interventions": [item], **rest}))


def edits(plan: SteeringPlan) -> list[Any]:
    """All that a plan does."""
    parts = ("shift", "read", "write", "laws", "side")
    return [
        (str(point), name, part.tolist())
        for rule in plan.rules
        for point, block in rule.blocks.items()
        for name in parts
        if (part := getattr(block, name)) is not None
    ]


WHERE_A_VECTOR_STANDS: dict[str, dict[str, Any]] = {
    "add": {"kind": "add", "vector": "A", "strength": 2.0},
    "add a share": {"kind": "add", "vector": "A", "strength": {"norm": 0.2}},
    "ablate": {"kind": "ablate", "vector": "A"},
    "project": {"kind": "project", "vector": "A", "value": 1.0, "mode": "at_most"},
    "swap": {"kind": "swap", "remove": "A", "add": "B"},
    "exchange": {"kind": "exchange", "vector": "A", "toward": "B"},
    "exchange both": {"kind": "exchange", "vector": "A", "toward": "B", "mode": "one_way"},
    "read_write": {"kind": "read_write", "read": "A", "write": "B", "strength": 0.5},
    "rotate": {"kind": "rotate", "vector": "A", "toward": "B", "degrees": 30, "mode": "to"},
    "patch": {"kind": "patch", "vector": "A"},
    "a stored vector beside it": {"kind": "swap", "remove": "v", "add": "B"},
}


def filled(item: dict[str, Any], a: Any, b: Any) -> dict[str, Any]:
    return {key: {"A": a, "B": b}.get(one, one) if isinstance(one, str) else one
            for key, one in item.items()}  # fmt: skip


@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
@pytest.mark.parametrize("lens", [None, "tuned", "jacobian"])
@pytest.mark.parametrize("name", WHERE_A_VECTOR_STANDS)
def test_it_does_what_the_same_rows_do_under_a_name(name: str, lens: str | None, site: Any) -> None:
    item = {**WHERE_A_VECTOR_STANDS[name], "layers": [1, 2], "site": site}
    said = {} if lens is None else {"lens": lens}
    spec = filled(item, {"token": " Paris", **said}, {"token": 9, **said})
    named = cache({"a": stored(5, lens, site), "b": stored(9, lens, site)})
    wanted = named.plan(parse_spec({"interventions": [filled(item, "a", "b")]}))
    assert edits(plan(spec)) == edits(wanted) != []


@pytest.mark.parametrize("scope", ["prompt", "token"])
def test_a_gate_reads_it(scope: str) -> None:
    when = {"above": 0.1, "layer": 1, "scope": scope}
    item = {"kind": "ablate", "vector": "v", "layers": [2]}
    gated = plan(item, when={**when, "vector": PARIS})
    named = cache({"a": stored(5, "tuned")})
    wanted = named.plan(parse_spec({"interventions": [item], "when": {**when, "vector": "a"}}))
    assert gated.rules[0].gate is not None
    assert wanted.rules[0].gate is not None
    assert torch.equal(gated.rules[0].gate.direction, wanted.rules[0].gate.direction)
    described = gated.summary[0]["when"]["vector"]
    assert described == {"token": 5, "lens": f"tuned@{LENSES['tuned'].sha256[:12]}"}


def test_tokens_compose_as_vectors_do() -> None:
    items = [{"kind": "ablate", "vector": one, "layers": [1]} for one in (PARIS, ROME)]
    named = cache({"a": stored(5, "tuned"), "b": stored(9, "tuned")})
    wanted = named.plan(
        parse_spec(
            {
                "interventions": [{**items[0], "vector": "a"}, {**items[1], "vector": "b"}],
                "compose": "orthogonal",
            }
        )
    )
    both = cache().plan(parse_spec({"interventions": items, "compose": "orthogonal"}))
    assert edits(both) == edits(wanted) != []


@pytest.mark.parametrize("strength", [0, {"norm": 0}])
def test_strength_zero_is_no_edit(strength: Any) -> None:
    assert plan({"kind": "add", "vector": PARIS, "strength": strength, "layers": [1]}).rules == ()


def test_strength_one_is_a_length_of_one() -> None:
    (block,) = (
        plan({"kind": "add", "vector": PARIS, "strength": 1, "layers": [1]})
        .rules[0]
        .blocks.values()
    )
    assert block.shift is not None
    assert float(block.shift.norm()) == pytest.approx(1.0, abs=1e-6)


ABLATE: dict[str, Any] = {"kind": "ablate", "layers": [1]}


def test_plans_are_kept_by_what_is_meant() -> None:
    plans = cache()

    def found(vector: Any) -> SteeringPlan:
        return plans.plan(parse_spec({"interventions": [{**ABLATE, "vector": vector}]}))

    first = found(PARIS)
    assert found(PARIS) is first
    assert found({"token": 5, "lens": "tuned"}).fingerprint == first.fingerprint
    others = [found({"token": 5}), found(ROME), found({"token": 5, "lens": "jacobian"})]
    assert len({one.fingerprint for one in (first, *others)}) == 4
    assert LENSES["tuned"].sha256 in first.artefacts
    assert first.summary[0]["vector"] == {
        "token": 5,
        "lens": f"tuned@{LENSES['tuned'].sha256[:12]}",
    }


def test_another_lens_of_the_same_name_is_another_plan(monkeypatch: pytest.MonkeyPatch) -> None:
    plans = cache()
    spec = parse_spec({"interventions": [{**ABLATE, "vector": PARIS}]})
    first = plans.plan(spec)
    monkeypatch.setitem(LENSES, "tuned", random_lens(9, 4))
    assert plans.plan(spec).fingerprint != first.fingerprint


def test_the_lens_is_a_reference_like_any_other() -> None:
    spec = parse_spec(
        {
            "interventions": [
                {"kind": "swap", "remove": PARIS, "add": {"token": 9}, "layers": [1]},
                {**ABLATE, "vector": "v"},
            ],
            "when": {"vector": ROME, "above": 0.1, "layer": 0},
        }
    )
    found = [(one.kind, one.name, one.param) for one in spec.references()]
    assert found == [
        ("vector", None, "/interventions/0/remove"),
        ("lens", "tuned", "/interventions/0/remove/lens"),
        ("vector", None, "/interventions/0/add"),
        ("vector", "v", "/interventions/1/vector"),
        ("vector", None, "/when/vector"),
        ("lens", "tuned", "/when/vector/lens"),
    ]

    def exact(reference: Reference) -> str:
        return f"{reference.name}@abcdef"

    profile = pinned(Profile(name="p", spec=spec), exact)
    kept = json.loads(profile.spec.model_dump_json(exclude_none=True))
    assert kept["interventions"][0]["remove"] == {"token": " Paris", "lens": "tuned@abcdef"}
    assert kept["when"]["vector"] == {"token": 9, "lens": "tuned@abcdef"}
    assert isinstance(spec.interventions[0].remove, TokenVector)  # type: ignore[union-attr]


def test_a_server_that_takes_no_vectors_in_requests_takes_tokens() -> None:
    item = {**ABLATE, "vector": PARIS}
    plans = cache(policy=Policy(inline_vectors=False))
    assert plans.plan(parse_spec({"interventions": [item]})).rules


def test_it_lies_in_a_plans_file() -> None:
    made = plan({**ABLATE, "vector": PARIS})
    again = load_plan(dump_plan(made), random_sae)
    assert (again.fingerprint, again.spec, edits(again)) == (
        made.fingerprint, made.spec, edits(made),
    )  # fmt: skip


def add(**fields: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": PARIS, "strength": 1, "layers": [1], **fields}


WRONG: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "no layers": (add(layers=None), "no_layers", "/layers", "no card"),
    "no strength": (add(strength=None), "no_strength", "/strength", "norm"),
    "calibrated": (add(strength={"kl": 0.1}), "not_calibrated", "/strength", "token 5"),
    "site": (add(site="mlp_out"), "unsupported_site", "/site", "resid_post or resid_pre"),
    "layer": (
        add(vector={"token": 5, "lens": "jacobian"}, site="resid_pre", layers=[0, 1]),
        "layer_not_in_vector", "/layers", "token 5 of the lens",
    ),
    "out of range": (add(layers=[4]), "layer_out_of_range", "/layers", "0 to 3"),
    "lens": (
        add(vector={"token": 5, "lens": "nobody"}), "unknown_lens", "/vector/lens", "nobody",
    ),
    "row of zeros": (add(vector={"token": 0}), "no_direction", "/vector/token", "another token"),
    "class mean": (
        {"kind": "project", "vector": PARIS, "value": "positive", "layers": [1]},
        "not_measured", "/value", "as a number",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_done_is_said(name: str) -> None:
    item, code, param, says = WRONG[name]
    with pytest.raises(SteerError, match=says) as caught:
        plan(item)
    assert (caught.value.code, caught.value.param) == (code, f"/interventions/0{param}")


def test_a_gate_needs_its_layer() -> None:
    with pytest.raises(SpecError, match="'layer'") as caught:
        plan({**ABLATE, "vector": "v"}, when={"vector": PARIS, "above": 0.1})
    assert (caught.value.code, caught.value.param) == ("no_layers", "/when/layer")


def test_without_a_model_there_is_no_output_matrix() -> None:
    with pytest.raises(Unsupported, match="send the spec to an engine") as caught:
        cache(read_token=None).plan(parse_spec({"interventions": [add()]}))
    assert caught.value.param == "/interventions/0/vector/token"


def wrong_forms() -> Iterator[tuple[dict[str, Any], str]]:
    yield {"token": -1}, "/vector/token"
    yield {"token": ""}, "/vector/token"
    yield {"token": 1.5}, "/vector/token"
    yield {"token": True}, "/vector/token"
    yield {"token": "a", "lens": "no name!"}, "/vector/lens"
    yield {"token": "a", "layer": 2}, "/vector/layer"
    yield {"lens": "tuned"}, "/vector/lens"


@pytest.mark.parametrize(("vector", "param"), list(wrong_forms()))
def test_wrong_forms_are_named(vector: dict[str, Any], param: str) -> None:
    with pytest.raises(SpecError) as caught:
        parse_spec({"interventions": [add(vector=vector)]})
    assert f"/interventions/0{param}" in [one.param for one in caught.value.problems]
