"""Conceptors: their algebra, what a few directions keep, and that a poor rank is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.methods.linear.conceptor import Conceptor, fit_conceptor
from steer.model import HookPoint
from steer.spec import parse_spec

PROMPTS = [f"the {word} sun {n}" for n in range(4) for word in ("red", "blue", "old")]


def second_moment(power: float, width: int = 50) -> Tensor:
    """R of states whose spectrum falls as a power."""
    turn = torch.linalg.qr(
        torch.randn(width, width, generator=torch.Generator().manual_seed(0)).double()
    ).Q
    spectrum = torch.arange(1, width + 1, dtype=torch.float64) ** -power
    return turn @ spectrum.diag() @ turn.T


@pytest.mark.parametrize("aperture", [0.5, 3.0])
def test_all_of_its_directions_are_the_conceptor(aperture: float) -> None:
    moment = second_moment(1.0)
    one = Conceptor.of(moment, aperture)
    eye = torch.eye(50, dtype=torch.float64)
    wanted = moment @ torch.linalg.inv(moment + aperture**-2 * eye)
    edits = one.edits(50)
    torch.testing.assert_close(edits.write.T @ edits.read, wanted, rtol=0, atol=1e-12)
    assert one.error(50) == 0.0


def test_the_error_is_what_a_rank_leaves_out_of_the_operator() -> None:
    """On a slow spectrum 20 of 50 directions leave out half of it."""
    one = Conceptor.of(second_moment(0.2), 2.0)
    edits, whole = one.edits(20), one.edits(50)
    left = whole.write.T @ whole.read - edits.write.T @ edits.read
    relative = left.norm() / (whole.write.T @ whole.read).norm()
    assert one.error(20) == pytest.approx(float(relative))
    assert one.error(20) > 0.5
    for limit in (0.5, 0.1, 0.01):
        rank = one.rank_within(limit)
        assert one.error(rank) <= limit < one.error(rank - 1)


def test_what_is_served_is_the_state_and_its_conceptor(lively: TransformersEngine) -> None:
    adapter = fit_conceptor(lively, PROMPTS, name="c", layers=[1], aperture=1.0, max_error=0.05)
    plan = plans_of(lively, MemoryLibrary(low_ranks={"c": adapter})).plan(
        parse_spec({"interventions": [{"kind": "low_rank", "adapter": "c", "strength": -1.0}]})
    )
    point, tokens = HookPoint(1), lively.tokenizer.encode(PROMPTS[0])
    before, after = (
        lively.capture(CaptureRequest([tokens], (point,), plans=[one]))[0].states[point]
        for one in (None, plan)
    )
    edits = adapter.edits(1)
    expected = before - before @ edits.read.T @ edits.write
    torch.testing.assert_close(after, expected, rtol=0, atol=1e-3)
    made: Any = adapter.card.provenance
    assert made["ranks"]["1"] == len(edits.bias)
    assert 0 < made["errors"]["1"] <= 0.05
    # Taken away, little of the concept's own states is left.
    assert float(after.norm() / before.norm()) < 0.5


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"rank": 1, "aperture": 10.0}, "rank_too_small"),
        ({"rank": 99}, "invalid_option"),
        ({"aperture": 0.0}, "invalid_option"),
        ({"max_error": 1.0}, "invalid_option"),
        ({"layers": [9]}, "layer_out_of_range"),
    ],
)
def test_what_would_not_be_the_conceptor_is_refused(
    engine: TransformersEngine, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        fit_conceptor(engine, PROMPTS, **{"name": "c", "layers": [1], **options})
    assert caught.value.code == code
