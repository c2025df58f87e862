"""Angular Steering: the plane, and that states are turned in it."""

from __future__ import annotations

import pytest
import torch

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.data.pairs import Pair, PairSet
from steer.fit.methods.fitting import fit
from steer.fit.methods.linear.angular import fit_angular, plane
from steer.model import HookPoint
from steer.spec import parse_spec

PAIRS = PairSet.of([Pair(f"sun {n} up!", f"a day {n}, so") for n in range(12)])


def test_the_plane_is_spanned_by_the_best_candidate_and_what_the_others_add() -> None:
    """Candidates that lie in a plane give that plane."""
    one, other = torch.linalg.qr(
        torch.randn(20, 2, generator=torch.Generator().manual_seed(0)).double()
    ).Q.T
    candidates = {n: 3.0 * (one + 0.3 * n * other) for n in range(4)}
    first, second = plane(candidates, 2)
    best = candidates[2] / candidates[2].norm()
    torch.testing.assert_close(first, best)
    basis = torch.stack([first, second])
    torch.testing.assert_close(basis @ basis.T, torch.eye(2, dtype=torch.float64))
    for row in candidates.values():
        torch.testing.assert_close(row @ basis.T @ basis, row)


@pytest.mark.parametrize("candidates", [{1: torch.ones(4)}, {1: torch.ones(4), 2: torch.ones(4)}])
def test_candidates_that_span_no_plane_are_refused(candidates: dict[int, torch.Tensor]) -> None:
    with pytest.raises(SteerError) as caught:
        plane(candidates, 1)
    assert caught.value.code == "no_plane"


def test_states_are_turned_to_the_angle_in_the_fitted_plane(lively: TransformersEngine) -> None:
    vector, toward = fit_angular(lively, PAIRS, name="up")
    assert (vector.card.name, toward.card.name) == ("up", "up-toward")
    assert vector.card.layers == toward.card.layers
    base = fit(lively, PAIRS, name="up")
    (best,) = base.card.used_layers
    assert vector.card.provenance["best_layer"] == best
    torch.testing.assert_close(vector[0], base[best] / base[best].norm(), rtol=0, atol=1e-6)
    item = {"kind": "rotate", "vector": "up", "toward": "up-toward", "degrees": 60, "mode": "to"}
    plan = plans_of(lively, MemoryLibrary(vectors={"up": vector, "up-toward": toward})).plan(
        parse_spec({"interventions": [{**item, "layers": [1]}]})
    )
    point, tokens = HookPoint(1), lively.tokenizer.encode("a day 3")
    before, after = (
        lively.capture(CaptureRequest([tokens], (point,), plans=[one]))[0].states[point]
        for one in (None, plan)
    )
    axes = torch.stack([vector[1], toward[1]])
    length = (before @ axes.T).norm(dim=-1)
    turned = after @ axes.T
    torch.testing.assert_close(turned[:, 0], 0.5 * length, rtol=0, atol=1e-4)
    torch.testing.assert_close(turned.norm(dim=-1), length, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(after.norm(dim=-1), before.norm(dim=-1), rtol=1e-4, atol=1e-4)
