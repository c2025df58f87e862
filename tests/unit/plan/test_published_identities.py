"""What the papers' operations are in our kinds: identities that must hold, and properties.

Formulas are those of the papers or of their code, in float64; ours run in float32.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from artefacts import EVERYTHING, shape_of
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.affine import AffineMap, Channels
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.edits import apply
from steer.model import HookPoint
from steer.plan.compiler import compile_plan
from steer.plan.sources import Sources
from steer.spec import parse_spec

D = 16
POINT = HookPoint(1)

seeds = st.integers(0, 10_000)


def draw(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def steered(x: Tensor, item: dict[str, Any], **artefacts: Any) -> Tensor:
    """`x` `[n, D]` after `item`; `artefacts` are rows `[D]`, adapters' `EditRows`, `Channels`."""
    vectors = {n: ControlVector.of({1: a}) for n, a in artefacts.items() if isinstance(a, Tensor)}
    adapters = {
        n: LowRankAdapter.of({1: a}) for n, a in artefacts.items() if isinstance(a, EditRows)
    }
    maps = {n: AffineMap.of({1: a}) for n, a in artefacts.items() if isinstance(a, Channels)}
    library = MemoryLibrary(vectors, low_ranks=adapters, maps=maps)
    spec = parse_spec({"interventions": [{**item, "layers": [1]}]})
    plan = compile_plan(spec, Sources(library, shape_of(D)), EVERYTHING)
    (rule,) = plan.rules
    return apply(rule.blocks[POINT], x.float()).double()


def same(found: Tensor, wanted: Tensor, tolerance: float = 1e-5) -> None:
    size = 1 + float(wanted.abs().max())
    assert float((found - wanted).abs().max()) <= tolerance * size


# Suppression and caps


@given(seed=seeds, bias=st.floats(-3, 3))
def test_suppression_of_reps_is_a_bound_on_the_projection(seed: int, bias: float) -> None:
    """h − ReLU(⟨v, h⟩ + b)v/‖v‖² (2505.20809) = `project` at most −b/‖v‖, and nothing is left."""
    x, v = 3 * draw(20, D, seed=seed), draw(D, seed=seed + 1)
    wanted = x - (x @ v + bias).clamp_min(0)[:, None] * v / (v @ v)
    project = {"kind": "project", "vector": "v", "value": -bias / float(v.norm())}
    same(steered(x, {**project, "mode": "at_most"}, v=v), wanted)
    item = {"kind": "read_write", "read": "v", "write": "v", "bias": bias}
    after = steered(x, {**item, "strength": -1 / float(v @ v)}, v=v)
    same(after, wanted)
    assert float((after @ v).max()) <= -bias + 1e-4


@given(seed=seeds, bound=st.floats(-3, 3))
def test_a_cap_on_an_axis_bounds_from_above(seed: int, bound: float) -> None:
    """x − ReLU(⟨x, v̂⟩ − τ)v̂ (2601.10387); a cap on −axis at τ is a floor on the axis at −τ."""
    x, v = 3 * draw(20, D, seed=seed), draw(D, seed=seed + 1)
    unit = v / v.norm()
    wanted = x - (x @ unit - bound).clamp_min(0)[:, None] * unit
    cap = {"kind": "project", "vector": "v", "value": bound, "mode": "at_most"}
    same(steered(x, cap, v=v), wanted)
    floor = {"kind": "project", "vector": "v", "value": -bound, "mode": "at_least"}
    same(steered(x, cap, v=-v), steered(x, floor, v=v))


# Low rank


def test_psr_is_an_adapter_and_a_read_write() -> None:
    """x + α·ReLU(w·x + b)z (2605.03907), where z is much longer than w."""
    x, w, z = draw(30, D), draw(D, seed=1) / 100, 1000 * draw(D, seed=2)
    wanted = x + 0.7 * (x @ w + 0.01).clamp_min(0)[:, None] * z
    item = {"kind": "read_write", "read": "w", "write": "z", "bias": 0.01, "strength": 0.7}
    same(steered(x, item, w=w, z=z), wanted)
    edits = EditRows(w[None], z[None], torch.tensor([0.01]), torch.zeros(1))
    same(steered(x, {"kind": "low_rank", "adapter": "psr", "strength": 0.7}, psr=edits), wanted)


def test_alphasteer_is_one_linear_edit() -> None:
    """x + α·Δᵀx with Δ = P(XᵀX + λP)⁺Xᵀ1rᵀ (2506.07022), whose rank is 1; with an exact null space
    what is benign stays as it is."""
    benign = draw(40, D - 4, seed=3) @ draw(D - 4, D, seed=4)
    harmful, r = draw(30, D, seed=5), draw(D, seed=6)
    _, _, rows = torch.linalg.svd(benign.T @ benign)
    null = rows[D - 4 :].T
    p = null @ null.T
    x = harmful @ p
    delta = p @ torch.linalg.pinv(x.T @ x + 10 * p) @ x.T @ torch.ones(30, 1).double() @ r[None]
    values = torch.linalg.svdvals(delta)
    assert values[1] / values[0] < 1e-10
    q = delta @ r / (r @ r)
    edits = EditRows(q[None], r[None], torch.zeros(1))
    states = draw(20, D, seed=7)
    item = {"kind": "low_rank", "adapter": "alpha", "strength": -0.4}
    same(steered(states, item, alpha=edits), states - 0.4 * states @ delta)
    same(steered(benign, item, alpha=edits), benign)


def test_a_conceptor_is_as_many_edits_as_it_has_directions() -> None:
    """x + β·Cx with C = R(R + a⁻²I)⁻¹, R = XᵀX/n (2410.16314)."""
    samples, aperture, beta = draw(50, D, seed=8), 2.0, 0.5
    r = samples.T @ samples / len(samples)
    c = r @ torch.linalg.inv(r + aperture**-2 * torch.eye(D))
    values, directions = torch.linalg.eigh(c)
    rows = directions.T
    edits = EditRows(values[:, None] * rows, rows, torch.zeros(D))
    x = draw(20, D, seed=9)
    item = {"kind": "low_rank", "adapter": "c", "strength": beta}
    same(steered(x, item, c=edits), x + beta * x @ c)


# Exchanges


@given(seed=seeds)
def test_an_exchange_swaps_the_two_coordinates(seed: int) -> None:
    """x + V(σc − c) with c = V⁺x (the Jacobian lens' swap): the rest of x stays, the reflection
    keeps the norm, and twice is nothing."""
    x, a, b = draw(20, D, seed=seed), draw(D, seed=seed + 1), draw(D, seed=seed + 2)
    item = {"kind": "exchange", "vector": "a", "toward": "b", "mode": "both"}
    after = steered(x, item, a=a, b=b)
    both = torch.stack([a / a.norm(), b / b.norm()])
    inverse = torch.linalg.pinv(both)
    same(after @ inverse, (x @ inverse).flip(1), 1e-4)
    same(after - after @ inverse @ both, x - x @ inverse @ both, 1e-4)
    u = both[1] - both[0]
    same(after, x - 2 * (x @ u)[:, None] * u / (u @ u), 1e-4)
    same(after.norm(dim=1), x.norm(dim=1), 1e-4)
    same(steered(after, item, a=a, b=b), x, 1e-4)


@given(seed=seeds, strength=st.sampled_from([0.1, 0.3, 0.5]))
def test_half_an_exchange_may_be_repeated(seed: int, strength: float) -> None:
    """Up to α = ½ what stands in the next layer's stream is nearer to alike, and never turned
    around: so such an exchange may act on several layers."""
    x, a, b = draw(20, D, seed=seed), draw(D, seed=seed + 1), draw(D, seed=seed + 2)
    item = {"kind": "exchange", "vector": "a", "toward": "b", "mode": "both", "strength": strength}
    rows = {"a": a, "b": b}
    inverse = torch.linalg.pinv(torch.stack([a / a.norm(), b / b.norm()]))

    def apart(states: Tensor) -> Tensor:
        coordinates = states @ inverse
        return coordinates[:, 0] - coordinates[:, 1]

    once = steered(x, item, **rows)
    same(apart(once), (1 - 2 * strength) * apart(x), 1e-4)
    same(apart(steered(once, item, **rows)), (1 - 2 * strength) ** 2 * apart(x), 1e-4)
    library = MemoryLibrary(
        {name: ControlVector.of({1: row, 2: row}) for name, row in rows.items()}
    )
    spec = parse_spec({"interventions": [{**item, "layers": [1, 2]}]})
    (rule,) = compile_plan(spec, Sources(library, shape_of(D)), EVERYTHING).rules
    assert len(rule.blocks) == 2


@given(seed=seeds)
def test_one_way_never_gives_up_what_it_goes_toward(seed: int) -> None:
    x, a, b = draw(20, D, seed=seed), draw(D, seed=seed + 1), draw(D, seed=seed + 2)
    item = {"kind": "exchange", "vector": "a", "toward": "b"}
    inverse = torch.linalg.pinv(torch.stack([a / a.norm(), b / b.norm()]))
    after = steered(x, {**item, "mode": "one_way"}, a=a, b=b)
    same((after @ inverse)[:, 1], (x @ inverse).amax(1), 1e-4)
    moves = x + (x @ a)[:, None] / a.norm() * (b / b.norm() - a / a.norm())
    same(steered(x, item, a=a, b=b), moves)


# Angles


@given(seed=seeds, degrees=st.floats(-400, 400), scale=st.sampled_from([0.01, 1.0, 100.0]))
def test_turning_to_an_angle(seed: int, degrees: float, scale: float) -> None:
    """x − Px + ‖Px‖(cos θ·b1 + sin θ·b2) (2510.26243): exact, norm kept, again changes nothing."""
    x = scale * draw(20, D, seed=seed)
    a, b = draw(D, seed=seed + 1), draw(D, seed=seed + 2)
    first = a / a.norm()
    second = b - (b @ first) * first
    second = second / second.norm()
    part = (x @ first)[:, None] * first + (x @ second)[:, None] * second
    angle = math.radians(degrees)
    aim = math.cos(angle) * first + math.sin(angle) * second
    wanted = x - part + part.norm(dim=1, keepdim=True) * aim
    item = {"kind": "rotate", "vector": "a", "toward": "b", "degrees": degrees, "mode": "to"}
    after = steered(x, item, a=a, b=b)
    same(after / scale, wanted / scale)
    same(after.norm(dim=1) / scale, x.norm(dim=1) / scale)
    same(steered(after, item, a=a, b=b) / scale, after / scale)
    gated = steered(x, {**item, "only": "positive"}, a=a, b=b)
    positive = (x @ first > 0)[:, None]
    same(gated / scale, torch.where(positive, wanted, x) / scale)
    assert torch.equal(gated[~positive[:, 0]], x.float().double()[~positive[:, 0]])


# Channels


def test_a_map_of_linear_act_carries_the_source_to_the_target() -> None:
    """ω = Σãb̃/Σã² on sorted samples and β = m_b − ω·m_a (2410.23054): with λ = 1 the mean is that
    of the target and the slope that of least squares; outside the source's range nothing changes.
    """
    source, target = draw(200, D, seed=10), 1 + 0.5 * draw(200, D, seed=11)
    a, b = source.sort(0).values, target.sort(0).values
    centred = a - a.mean(0)
    scale = (centred * (b - b.mean(0))).sum(0) / centred.square().sum(0)
    shift = b.mean(0) - scale * a.mean(0)
    plain = Channels(scale, shift)
    carried = steered(source, {"kind": "affine", "map": "m"}, m=plain)
    same(carried.mean(0), target.mean(0))
    slopes = [np.polyfit(a[:, n], b[:, n], 1)[0] for n in range(D)]
    same(scale, torch.tensor(slopes))
    half = steered(source, {"kind": "affine", "map": "m", "strength": 0.5}, m=plain)
    same(half, (source + carried) / 2)
    bounded = Channels(scale, shift, a[0], a[-1])
    outside = 10 + draw(5, D, seed=12).abs()
    kept = steered(torch.cat([source[1:2], outside]), {"kind": "affine", "map": "m"}, m=bounded)
    assert torch.equal(kept[1:], outside.float().double())
    same(kept[:1], carried[1:2])


# Cosines


@pytest.mark.parametrize("factor", [1e-3, 1.0, 1e4])
def test_a_cosine_in_units_of_the_norm_knows_no_scale(factor: float) -> None:
    x, r, w = draw(20, D), draw(D, seed=1), draw(D, seed=2)
    item = {"kind": "read_write", "read": "r", "write": "w", "measure": "cosine"}
    item |= {"threshold": 0.1, "strength": {"norm": 0.8}}
    once = steered(x, item, r=r, w=w)
    same(steered(factor * x, item, r=r, w=w) / factor, once)
    cosine = torch.cosine_similarity(x, r[None])
    moved = (once - x).norm(dim=1) / x.norm(dim=1)
    same(moved, torch.where(cosine > 0.1, 0.8 * cosine, 0.0))
