"""What a spec refers to: found by the marks on its fields, whichever model has them."""

from __future__ import annotations

import random
import subprocess
import sys
from collections.abc import Iterator
from typing import Annotated, Any, Literal

import pytest
from artefacts import random_spec
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel

from steer.references import Names, Reference, own_references, put_at, references_in
from steer.spec import (
    AdapterRef,
    InlineVector,
    SAERef,
    SteeringSpec,
    VectorRef,
    When,
    parse_spec,
)

INLINE = {"data": "AAAA", "layer": 2}
FIELDS = {
    "vector": "vector",
    "remove": "vector",
    "add": "vector",
    "toward": "vector",
    "sae": "sae",
    "adapter": "low_rank",
    "read": "vector",
    "write": "vector",
    "map": "affine",
    "detector": "detector",
}


def naive(value: Any, at: str = "") -> Iterator[tuple[str, Any, str]]:
    """Every field of a spec's JSON that is called like one that names an artefact."""
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from naive(item, f"{at}/{place}")
    elif isinstance(value, dict):
        for key, item in value.items():
            if key in FIELDS:
                yield FIELDS[key], item, f"{at}/{key}"
            else:
                yield from naive(item, f"{at}/{key}")


@st.composite
def specs(draw: st.DrawFn) -> dict[str, Any]:
    """Random specs, some of whose vectors come with them, and with gates."""
    spec = random_spec(random.Random(draw(st.integers(0, 1 << 32))), longest=8)
    for item in spec["interventions"]:
        for field in ("vector", "remove", "add", "toward", "read", "write"):
            if field in item and draw(st.booleans()):
                item[field] = INLINE
    for one in [spec, *spec["interventions"]]:
        if draw(st.booleans()):
            gate = {"vector": draw(st.sampled_from(["gate@abcdef", INLINE])), "above": 0.1}
            one["when"] = draw(st.sampled_from([gate, {"detector": "d@abcdef"}]))
    if draw(st.booleans()):
        spec["interventions"].append({"kind": "concept", "sae": "s", "text": "sea"})
    return spec


@given(specs())
def test_the_marks_find_what_a_walk_of_the_json_finds(given_spec: dict[str, Any]) -> None:
    spec = parse_spec(given_spec)
    document = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    found = [
        (kind, ref if isinstance(ref, str) else ref.model_dump(exclude_none=True), param)
        for kind, ref, param in spec.references()
    ]
    assert len({param for _, _, param in found}) == len(found)
    assert sorted(found, key=str) == sorted(naive(document), key=str)


def test_own_fields_come_before_gates_and_the_whole_specs_gate_last() -> None:
    gate = {"vector": "g", "above": 0.1}
    item = {"kind": "swap", "remove": "a", "add": INLINE, "when": gate}
    low_rank = {"kind": "low_rank", "adapter": "r", "when": {"detector": "d"}}
    spec = parse_spec({"when": gate, "interventions": [item, low_rank]})
    inline = InlineVector.model_validate(INLINE)
    assert list(spec.references()) == [
        Reference("vector", "a", "/interventions/0/remove"),
        Reference("vector", inline, "/interventions/0/add"),
        Reference("vector", "g", "/interventions/0/when/vector"),
        Reference("low_rank", "r", "/interventions/1/adapter"),
        Reference("detector", "d", "/interventions/1/when/detector"),
        Reference("vector", "g", "/when/vector"),
    ]
    assert [one.name for one in spec.references()] == ["a", None, "g", "r", "d", "g"]


class Graft(BaseModel):
    """A kind that nobody else knows, with marks in every place where one may stand."""

    kind: Literal["graft"] = "graft"
    basis: SAERef
    onto: VectorRef | None = None
    branches: tuple[VectorRef, ...] = ()
    tool: AdapterRef | None = None
    label: str = "no artefact"
    when: When | None = None


class Garden(SteeringSpec):
    interventions: tuple[Graft, ...]  # type: ignore[assignment]


def test_a_new_kind_is_found_by_its_marks_alone() -> None:
    first = {"basis": "s", "branches": ["b", INLINE], "tool": "t"}
    second = {"basis": "s2", "onto": "o", "when": {"vector": "g", "below": 0}}
    spec = Garden.model_validate({"interventions": [first, second]})
    inline = InlineVector.model_validate(INLINE)
    assert list(spec.references()) == [
        Reference("sae", "s", "/interventions/0/basis"),
        Reference("vector", "b", "/interventions/0/branches/0"),
        Reference("vector", inline, "/interventions/0/branches/1"),
        Reference("low_rank", "t", "/interventions/0/tool"),
        Reference("sae", "s2", "/interventions/1/basis"),
        Reference("vector", "o", "/interventions/1/onto"),
        Reference("vector", "g", "/interventions/1/when/vector"),
    ]
    assert [one.ref for one in own_references(spec.interventions[1])] == ["s2", "o"]


def test_a_field_has_one_mark() -> None:
    class Torn(BaseModel):
        both: Annotated[str, Names("sae")] | Annotated[int, Names("vector")]

    with pytest.raises(TypeError, match=r"Torn\.both is marked as \['sae', 'vector'\]"):
        list(references_in(Torn(both="x")))


@given(specs())
def test_what_stands_at_a_reference_can_be_replaced(given_spec: dict[str, Any]) -> None:
    spec = parse_spec(given_spec)
    document = spec.model_dump(mode="json", by_alias=True, exclude_none=True)
    for place, reference in enumerate(spec.references()):
        put_at(document, reference.param, f"n{place}")
    found = [one.ref for one in parse_spec(document).references()]
    assert found == [f"n{place}" for place in range(len(found))]


def test_reading_a_spec_needs_neither_torch_nor_numpy() -> None:
    code = "import sys, steer.spec; print(*({'torch', 'numpy'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""
