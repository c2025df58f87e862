"""`compose: "orthogonal"`: no overlap, nothing else changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import random_map, random_sae
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.edits import apply
from steer.engines.fake.engine import FakeEngine, fake_model
from steer.errors import SpecError
from steer.model import HookPoint
from steer.plan.compiler import compile_plan
from steer.plan.composition import orthogonalised
from steer.plan.plan import SteeringPlan
from steer.plan.sources import Sources
from steer.spec import KINDS, Where, parse_spec

D = 16
CAPABILITIES = FakeEngine().capabilities


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def vector(name: str, *rows: Tensor, **card: Any) -> ControlVector:
    return ControlVector.of(dict(enumerate(rows, start=1)), name=name, **card)


def plan(
    *interventions: dict[str, Any], vectors: dict[str, ControlVector], **spec: Any
) -> SteeringPlan:
    sources = Sources(MemoryLibrary(vectors), fake_model(d_model=D))
    return compile_plan(
        parse_spec({"interventions": list(interventions), **spec}), sources, CAPABILITIES
    )


def add(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": name, **more}


def shifts(found: SteeringPlan, point: HookPoint) -> list[Tensor]:
    """What each pass adds at `point`."""
    blocks = [one.blocks[point] for one in found.rules if point in one.blocks]
    return [block.shift for block in blocks if block.shift is not None]


@given(st.integers(2, 6), st.integers(0, 1000))
def test_no_overlap_the_same_lengths_and_the_same_span(count: int, seed: int) -> None:
    rows = draw(count, D, seed=seed) + 0.5 * draw(D, seed=seed + 1)
    found = orthogonalised(rows)
    unit = found / found.norm(dim=1, keepdim=True)
    off = unit @ unit.T - torch.eye(count)
    assert float(off.abs().max()) <= 1e-5
    torch.testing.assert_close(found.norm(dim=1), rows.norm(dim=1))
    basis = torch.linalg.qr(rows.T.double()).Q.float()
    torch.testing.assert_close(found @ basis @ basis.T, found, rtol=1e-3, atol=1e-4)


def test_orthogonal_vectors_stay_as_they_are_to_the_bit() -> None:
    rows = 3 * torch.eye(D)[:5]
    assert torch.equal(orthogonalised(rows), rows)
    turned = torch.linalg.qr(draw(D, D)).Q[:4] * 7
    torch.testing.assert_close(orthogonalised(turned), turned)


def test_none_comes_first_and_it_is_the_nearest_orthogonal_set() -> None:
    rows = draw(3, D)
    order = [2, 0, 1]
    torch.testing.assert_close(
        orthogonalised(rows)[order], orthogonalised(rows[order]), rtol=1e-4, atol=1e-5
    )
    unit = rows / rows.norm(dim=1, keepdim=True)
    ours = orthogonalised(unit)
    gram_schmidt = torch.linalg.qr(unit.T)
    others = (gram_schmidt.Q * gram_schmidt.R.diagonal().sign()).T
    assert float((ours - unit).norm()) < float((others - unit).norm())


def test_nearly_parallel_vectors_are_refused() -> None:
    row = draw(D)
    for rows in (torch.stack([row, row + 0.01 * draw(D, seed=1)]), torch.stack([row, -2 * row])):
        with pytest.raises(SpecError) as caught:
            orthogonalised(rows)
        assert (caught.value.code, caught.value.param) == ("not_composable", "/compose")


def test_a_plan_adds_directions_without_overlap() -> None:
    a, b = vector("a", draw(D), draw(D, seed=1)), vector("b", draw(D, seed=2), draw(D, seed=3))
    where = {"phases": ["prompt"]}, {"phases": ["generation"]}
    items = add("a", strength=2.0, where=where[0]), add("b", strength=-1.0, where=where[1])
    vectors = {"a": a, "b": b}
    composed = plan(*items, vectors=vectors, compose="orthogonal")
    plain = plan(*items, vectors=vectors)
    assert composed.fingerprint != plain.fingerprint
    for layer in (1, 2):
        point = HookPoint(layer)
        first, second = shifts(composed, point)
        assert abs(float(torch.cosine_similarity(first, second, dim=0))) <= 0.05
        expected = orthogonalised(torch.stack([a[layer], b[layer]]))
        torch.testing.assert_close(first, 2 * expected[0])
        torch.testing.assert_close(second, -expected[1])
        torch.testing.assert_close(shifts(plain, point)[0], 2 * a[layer])


def test_only_what_shares_a_hook_point_is_changed() -> None:
    a, b = vector("a", draw(D), draw(D, seed=1)), vector("b", draw(D, seed=2), draw(D, seed=3))
    items = add("a", layers=[1], strength=1.0), add("b", layers=[2], strength=1.0)
    found = plan(*items, vectors={"a": a, "b": b}, compose="orthogonal")
    assert torch.equal(shifts(found, HookPoint(1))[0], a[1])
    assert torch.equal(shifts(found, HookPoint(2))[0], b[2])


def test_a_vector_of_one_row_is_composed_on_every_layer_it_serves() -> None:
    one, b = ControlVector.of({3: draw(D)}, name="one"), vector("b", draw(D, seed=2), draw(D))
    items = (
        add("one", layers=[1, 2], strength=1.0, where={"phases": ["prompt"]}),
        add("b", layers=[1], strength=1.0, where={"phases": ["generation"]}),
    )
    found = plan(*items, vectors={"one": one, "b": b}, compose="orthogonal")
    first, second = shifts(found, HookPoint(1))
    assert abs(float(torch.cosine_similarity(first, second, dim=0))) <= 1e-5
    assert torch.equal(shifts(found, HookPoint(2))[0], one[3])


def test_the_same_vector_twice_counts_once() -> None:
    a, b = vector("a", draw(D)), vector("b", draw(D, seed=2))
    items = (
        add("a", strength=1.0, where={"phases": ["prompt"]}),
        add("a", strength=0.2, where={"phases": ["generation"]}),
        add("b", strength={"norm": 0.5}),
    )
    found = plan(*items, vectors={"a": a, "b": b}, compose="orthogonal")
    first, second = shifts(found, HookPoint(1))[:2]
    torch.testing.assert_close(second, 0.2 * first)
    (relative,) = (
        one.blocks[HookPoint(1)].write
        for one in found.rules
        if one.blocks[HookPoint(1)].write is not None
    )
    assert relative is not None
    assert abs(float(torch.cosine_similarity(first, relative[0], dim=0))) <= 1e-5
    assert float(relative[0].norm()) == pytest.approx(1.0, abs=1e-5)


def ablate(name: str, **more: Any) -> dict[str, Any]:
    return {"kind": "ablate", "vector": name, **more}


def run(found: SteeringPlan, point: HookPoint, x: Tensor) -> Tensor:
    for one in found.rules:
        x = apply(one.blocks[point], x)
    return x


@pytest.mark.parametrize("count", [2, 3])
def test_what_the_ablated_directions_span_is_taken_away(count: int) -> None:
    common = draw(D, seed=99)
    vectors = {n: vector(n, draw(D, seed=i) + common) for i, n in enumerate("abc"[:count])}
    x = draw(7, D, seed=50)
    rows = torch.stack([one[1] for one in vectors.values()])
    basis = torch.linalg.qr(rows.T.double()).Q
    wanted = (x.double() - x.double() @ basis @ basis.T).float()
    items = [ablate(name) for name in vectors]
    for order in (items, items[::-1]):
        found = plan(*order, vectors=vectors, compose="orthogonal")
        torch.testing.assert_close(run(found, HookPoint(1), x), wanted, rtol=1e-4, atol=1e-5)
    plain = run(plan(*items, vectors=vectors), HookPoint(1), x)
    assert float((plain - wanted).norm()) > 0.1


def test_ablations_of_one_point_need_the_same_tokens_where_they_overlap() -> None:
    turned = torch.linalg.qr(draw(D, D)).Q
    vectors = {"a": vector("a", draw(D)), "b": vector("b", draw(D, seed=2))}
    items = ablate("a", where={"phases": ["prompt"]}), ablate("b")
    with pytest.raises(SpecError, match="one 'where'") as caught:
        plan(*items, vectors=vectors, compose="orthogonal")
    assert (caught.value.code, caught.value.param) == ("not_composable", "/compose")
    apart = {"a": vector("a", turned[0]), "b": vector("b", turned[1])}
    assert len(plan(*items, vectors=apart, compose="orthogonal").rules) == 2


OTHER: dict[str, dict[str, Any]] = {
    "project": {"kind": "project", "vector": "b", "value": 1.0},
    "swap": {"kind": "swap", "remove": "b", "add": "a"},
    "rotate": {"kind": "rotate", "vector": "b", "toward": "a", "degrees": 20},
    "exchange": {"kind": "exchange", "vector": "b", "toward": "a"},
    "read_write": {"kind": "read_write", "read": "b", "write": "a"},
    "patch": {"kind": "patch", "vector": "b"},
    "low_rank": {"kind": "low_rank", "adapter": "reft"},
    "affine": {"kind": "affine", "map": "map"},
    "clamp": {"kind": "clamp", "sae": "sae", "features": [0], "value": 1.0},
    "concept": {"kind": "concept", "sae": "sae", "text": "sea"},
}


def compiled(*interventions: dict[str, Any]) -> SteeringPlan:
    """With vectors on layer 1 and everything else of the kinds in `OTHER` too."""
    vectors = {"a": vector("a", draw(D)), "b": vector("b", draw(D, seed=2))}
    reft = LowRankAdapter.of({1: (torch.eye(2, D), draw(2, D), torch.zeros(2))})
    library = MemoryLibrary(
        vectors,
        {"sae": random_sae("standard", width=D, layer=1)},
        {"reft": reft},
        maps={"map": random_map(3, 1, width=D)},
    )
    sources = Sources(library, fake_model(d_model=D), encode_text=lambda text, point: draw(2, D))
    spec = {"interventions": list(interventions), "compose": "orthogonal"}
    return compile_plan(parse_spec(spec), sources, CAPABILITIES)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in ("add", "ablate")])
def test_a_kind_that_is_not_composed_is_refused_where_it_meets_another(kind: str) -> None:
    for items in (
        [OTHER[kind]] * 2,
        [add("a", strength=1.0), OTHER[kind]],
        [OTHER[kind], ablate("a")],
    ):
        with pytest.raises(SpecError, match=kind) as caught:
            compiled(*items)
        assert (caught.value.code, caught.value.param) == ("not_composable", "/compose")
    assert compiled(OTHER[kind]).rules


def test_what_is_added_is_not_parted_from_what_is_ablated() -> None:
    with pytest.raises(SpecError, match="added that overlaps") as caught:
        compiled(add("a", strength=1.0), ablate("b"))
    assert caught.value.code == "not_composable"


def test_problems_of_the_vectors_and_of_their_composition_are_told_together() -> None:
    a, twin = vector("a", draw(D)), vector("twin", 2 * draw(D))
    with pytest.raises(SpecError) as caught:
        plan(
            add("a"),
            add("twin"),
            add("nobody"),
            vectors={"a": a, "twin": twin},
            compose="orthogonal",
        )
    assert {p.code for p in caught.value.problems} == {"not_composable", "unknown_vector"}


def test_an_adapter_acts_where_its_card_says() -> None:
    parts = {1: (torch.eye(2, D), torch.zeros(2, D), torch.zeros(2))}
    last = Where(positions=((-1, None),), phases=("prompt",))
    found = {}
    for name, where in (("anywhere", None), ("last", last)):
        adapter = LowRankAdapter.of(parts, name=name, default_where=where)
        sources = Sources(MemoryLibrary(low_ranks={name: adapter}), fake_model(d_model=D))
        spec = parse_spec({"interventions": [{"kind": "low_rank", "adapter": name}]})
        found[name] = compile_plan(spec, sources, CAPABILITIES)
    assert found["anywhere"].first_steered((1, 2, 3), 9) == 0
    assert found["last"].first_steered((1, 2, 3), 9) == 2
