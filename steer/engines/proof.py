"""What the start-up proofs of all engines share: an edit that no model can miss, and the comparison
with what the model computes without it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from steer.artefacts.sae.encoders import LatentRows, TopKEncoder
from steer.edits import Block
from steer.laws import Law
from steer.model import INNER_SITES, SITE_ORDER, HookPoint, ModelInfo
from steer.plan.plan import Rule, SteeringPlan
from steer.plan.selection import EVERYWHERE
from steer.spec import Patch, Site, SteeringSpec

_TIMES = 4.0
"""Size of an edit against the numbers around it: above what half precision rounds away."""

_PLACES = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_PLACES = 5e-2
"""How far a state may be from where an edit should move it, relative to the larger of the state and
its change."""

States = Mapping[HookPoint, Tensor]


def probe_shift(model: ModelInfo, site: Site, size: float = 10.0) -> Tensor:
    """What a probe adds at `site`: another number for each coordinate, up to `size`."""
    return torch.cos(torch.arange(model.width(site), dtype=torch.float32)) * size


def probe_plan(
    model: ModelInfo, point: HookPoint, *, constant: bool = True, size: float = 10.0
) -> SteeringPlan:
    """An edit that no model can miss, `probe_shift`; as a constant, or as an edit that reads the
    state."""
    direction = probe_shift(model, point.site, size)
    block = Block(shift=direction)
    if not constant:
        block = Block.of_edits(
            torch.zeros_like(direction)[None], direction[None], [Law.constant(1)]
        )
    return _plan(f"probe-{point}-{constant}", point, block)


def ranking_plan(model: ModelInfo, point: HookPoint) -> SteeringPlan:
    """`probe_shift` as the first of two latents of which one may be active. The second, were it
    active too, would drive the state beyond all numbers, and such a state is left alone."""
    direction = probe_shift(model, point.site)
    nothing = torch.zeros(2, len(direction))
    rows = LatentRows(nothing, torch.tensor([2.0, 1.0]))
    encoder = TopKEncoder(f"probe-{len(direction)}", rows, 1)
    write = torch.stack([direction, torch.full_like(direction, 3e38)])
    laws = [Law(bias=2.0, slope=0.5), Law(bias=1.0)]
    block = Block.of_edits(nothing, write, laws, encoder=encoder)
    return _plan(f"probe-{point}-ranks", point, block)


def _plan(name: str, point: HookPoint, block: Block) -> SteeringPlan:
    spec = SteeringSpec(interventions=(Patch(vector="probe"),))
    return SteeringPlan(name, spec, (Rule(EVERYWHERE, None, {point: block}),), (), (), ())


def edit_size(site: Site, states: States) -> float:
    """A size that shows at `site`: of what passes there, or of the stream that it is added to."""
    around = {site} if site in INNER_SITES else {"resid_pre", "resid_post"}
    sizes = [s.float().square().mean().sqrt() for at, s in states.items() if at.site in around]
    return max(10.0, _TIMES * float(torch.stack(sizes).max()))


def unchanged(row: Tensor, plain: Tensor, *, experts: bool) -> bool:
    """Bit-identical; in a mixture of experts, equal to rounding.

    There an edited neighbour may choose other experts, and the size of an expert's batch changes
    the last bits of every token in it, with or without Steer.
    """
    if torch.equal(row, plain):
        return True
    tolerance = 1e-4 if plain.dtype == torch.float32 else 5e-2
    return experts and torch.allclose(row, plain, rtol=tolerance, atol=tolerance)


def misplaced(
    point: HookPoint, shift: Tensor, moved: States, unmoved: States, dtype: torch.dtype
) -> HookPoint | None:
    """The first point of the block that an edit at `point`, which adds `shift`, did not move by
    what it adds there; that a point before it moves at all is as wrong.

    `unmoved` are the states of the block without the edit, and `moved` by how much they differ with
    it; the model computes in `dtype`.
    """
    tolerance = _PLACES.get(dtype, _HALF_PLACES)
    before = (at for at in moved if SITE_ORDER[at.site] < SITE_ORDER[point.site])
    wanted = {at: torch.zeros_like(moved[at]) for at in before}
    wanted[point] = shift.expand_as(moved[point])
    if point.site != "resid_post":  # after which comes nothing of the block
        wanted |= _sums(point, {at.site: change for at, change in moved.items()})
    for at, change in wanted.items():
        size = max(float(unmoved[at].norm()), float(change.norm()))
        if not float((moved[at] - change).norm()) <= tolerance * size:
            return at
    return None


def _sums(point: HookPoint, moved: Mapping[Site, Tensor]) -> dict[HookPoint, Tensor]:
    """By what the streams after `point` move: the stream before them, and what is added to it, as
    far as these were read (the first block of a pipeline's stage is handed its `resid_pre`)."""
    sums: dict[HookPoint, Tensor] = {}
    base: Site = "resid_mid" if "resid_mid" in moved else "resid_pre"
    parts: list[Site] = ["mlp_out"] if base == "resid_mid" else ["attn_out", "mlp_out"]
    if moved.keys() >= {base, *parts}:
        sums[HookPoint(point.layer, "resid_post")] = sum((moved[p] for p in parts), moved[base])
    if moved.keys() >= {"resid_pre", "attn_out", "resid_mid"} and point.site != "resid_mid":
        sums[HookPoint(point.layer, "resid_mid")] = moved["resid_pre"] + moved["attn_out"]
    return sums


_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_HALF_TOLERANCE = 0.1
"""Relative to the spread of the logits; a sequence that sees another is far outside."""

_HALF_OUTLIER = 0.5


def agree(logits: Tensor, others: Tensor, dtype: torch.dtype) -> bool:
    """Whether two ways of computing the same tokens in `dtype` differ by rounding alone."""
    return _apart(logits, others) <= _TOLERANCE.get(dtype, _HALF_TOLERANCE)


def follow(rows: Sequence[Tensor], others: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether two ways of computing a sequence in `dtype` differ by rounding alone, by the logits
    of its places one after the other.

    In half precision a state may be so near to nothing that rounding decides it (one place of four
    differed by .16 on a CPU that computes bfloat16 by other means, the others by .01). A place that
    sees what it should not leaves that in the cache for all after it. So most must agree, and none
    may be far off.
    """
    apart = [_apart(row, other) for row, other in zip(rows, others, strict=True)]
    if dtype in _TOLERANCE:
        return all(one <= _TOLERANCE[dtype] for one in apart)
    near = sum(one <= _HALF_TOLERANCE for one in apart)
    return 2 * near > len(apart) and all(one <= _HALF_OUTLIER for one in apart)


def _apart(logits: Tensor, others: Tensor) -> float:
    return float((logits - others).norm() / (others - others.mean()).norm())
