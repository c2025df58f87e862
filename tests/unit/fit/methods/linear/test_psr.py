"""PSR: a planted edit is found again, and what is fitted from a model brings states nearer."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from steer.artefacts.control_vector import LowRankAdapter
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.data.instruction import PLACEMENTS, Placement, Telling
from steer.fit.data.preferences import Preference, PreferenceSet
from steer.fit.measure.divergence import anchored
from steer.fit.methods.linear.psr import fit_psr, shift_fit
from steer.fit.methods.linear.relu import relu_regression, unexplained
from steer.fit.methods.trained.rows import answer_row
from steer.model import HookPoint
from steer.spec import parse_spec

WIDTH = 64


def planted(rows: int, seed: int, noise: float = 0.3) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """States, shifts ReLU(⟨w, x⟩ + b)·z with noise in every channel, and w and z."""
    fixed = torch.Generator().manual_seed(7)
    w = torch.randn(WIDTH, generator=fixed).double() / WIDTH**0.5
    z = torch.nn.functional.normalize(torch.randn(WIDTH, generator=fixed).double(), dim=0)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, WIDTH, generator=generator).double()
    shifts = (x @ w - 0.2).relu()[:, None] * z
    shifts = shifts + noise * torch.randn(rows, WIDTH, generator=generator).double()
    return x, shifts, w, z


def cosine(one: Tensor, other: Tensor) -> float:
    return float(torch.cosine_similarity(one, other, dim=0))


def test_a_planted_edit_is_found_again() -> None:
    x, shifts, w, z = planted(20_000, 0)
    held = planted(4_000, 1)
    found = shift_fit(x, shifts, held[0], held[1], penalty=1e-3)
    assert cosine(found.write, z) > 0.999
    assert cosine(found.read.weight, w) > 0.999
    assert found.read.bias == pytest.approx(-0.2, abs=0.02)
    assert found.unexplained < 0.32
    assert found.constant > 0.75
    edits = found.edits
    assert (edits.read.shape, edits.threshold) == ((1, WIDTH), torch.zeros(1))


def test_the_regression_is_exact_without_noise_and_shrinks_with_its_price() -> None:
    x, shifts, w, z = planted(3_000, 0, noise=0.0)
    lengths = shifts @ z
    free = relu_regression(x, lengths, 1e-9)
    torch.testing.assert_close(free.weight, w, rtol=0, atol=1e-3)
    assert unexplained(lengths, free(x)) < 1e-6
    dear = relu_regression(x, lengths, 1e4)
    assert dear.weight.norm() < 0.5 * free.weight.norm()


ASKS = PreferenceSet.of([Preference(f"the {n} day", f"sun {n}") for n in range(12)])


def fitted(engine: TransformersEngine, **options: Any) -> LowRankAdapter:
    arguments: dict[str, Any] = {"name": "p", "instruction": "Shout!", "layers": [1], **options}
    return fit_psr(engine, ASKS, **arguments)


def distance(
    engine: TransformersEngine,
    adapter: LowRankAdapter | None,
    layer: int,
    place: Placement = "system",
) -> float:
    """How far the states of answers are from those after the instruction, squared."""
    point, total = HookPoint(layer), 0.0
    plan = None
    if adapter is not None:
        plan = plans_of(engine, MemoryLibrary(low_ranks={"p": adapter})).plan(
            parse_spec({"interventions": [{"kind": "low_rank", "adapter": "p"}]})
        )
    for one in ASKS.items:
        assert one.chosen is not None
        told = answer_row(engine, Telling("Shout!", place)(one.prompt), one.chosen, ends=False)
        plain = answer_row(engine, one.prompt, one.chosen, ends=False)
        plans = [None, None if plan is None else anchored(plan, plain.prompt)]
        prompts = [told.fed, plain.fed]
        found = engine.capture(CaptureRequest(prompts, (point,), plans=plans))
        there, here = (
            one.states[point][row.prompt - 1 :]
            for one, row in zip(found, (told, plain), strict=True)
        )
        total += float((there - here).square().sum())
    return total


@pytest.mark.parametrize("place", PLACEMENTS)
def test_the_served_edit_leaves_of_the_shifts_what_the_card_says(
    place: Placement, lively: TransformersEngine
) -> None:
    """Σ‖δ − c·z‖² = Σ‖δ‖²·(1 − along·(1 − unexplained)), on the answers it was measured on."""
    adapter = fitted(lively, held_out=0.0, place=place)
    told: Any = adapter.card.provenance["shifts"]
    left = 1 - told["1"]["shift_along"] * (1 - told["1"]["unexplained"])
    before = distance(lively, None, 1, place)
    assert distance(lively, adapter, 1, place) == pytest.approx(left * before, rel=1e-3)
    assert left < 0.95


def test_layers_fitted_one_after_the_other_fit_together(lively: TransformersEngine) -> None:
    """Fitted each by itself, the second layer does again what the first one did."""
    greedy = fitted(lively, layers=[0, 1, 2])
    assert set(greedy.card.provenance["shifts"]) == {"0", "1", "2"}  # type: ignore[arg-type]
    alone = {n: fitted(lively, layers=[n]).parts[n] for n in (0, 1, 2)}
    apart = LowRankAdapter.of(alone, default_where=greedy.card.default_where)
    plain = distance(lively, None, 2)
    assert distance(lively, greedy, 2) < min(plain, distance(lively, apart, 2))


def test_answers_are_asked_for_where_they_are_missing(lively: TransformersEngine) -> None:
    done: list[int] = []
    asks = PreferenceSet.of([Preference(f"the {n} day") for n in range(6)])
    adapter = fit_psr(
        lively,
        asks,
        name="p",
        instruction="Shout!",
        layers=[0, 1],
        max_tokens=4,
        progress=done.append,
    )
    assert adapter.card.provenance["instruction"] == "Shout!"
    assert sum(done) >= 6


def test_an_instruction_that_moves_nothing_is_refused(engine: TransformersEngine) -> None:
    zero = torch.zeros(5, 4)
    with pytest.raises(SteerError) as caught:
        shift_fit(torch.ones(5, 4), zero, torch.ones(5, 4), zero, 1.0)
    assert caught.value.code == "no_difference"
