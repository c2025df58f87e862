"""AlphaSteer: its closed form against the paper's own, and what it leaves alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.data.labels import Labelled, LabelledSet
from steer.fit.data.where import where_named
from steer.fit.methods.linear.alphasteer import fit_alphasteer, null_basis, ridge_of_one
from steer.fit.methods.linear.moments import Moments
from steer.model import HookPoint
from steer.spec import parse_spec

WIDTH, PENALTY = 24, 10.0


def drawn(rows: int, seed: int, dimensions: int = WIDTH) -> Tensor:
    """States that fill the first `dimensions` of the space."""
    states = torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed)).double()
    states[:, dimensions:] = 0
    turn = torch.linalg.qr(
        torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(99)).double()
    )
    return states @ turn.Q


def moments(states: Tensor) -> Moments:
    found = Moments(WIDTH)
    for part in states.split(7):
        found.add(part)
    return found


def papers_update(benign: Tensor, harmful: Tensor, direction: Tensor, share: float) -> np.ndarray:
    """Δ = P(XᵀX + λP)⁺Xᵀ1rᵀ of 2506.07022, X = HP, by numpy and in its own words."""
    _, _, right = np.linalg.svd(benign.numpy())
    kept = right[WIDTH - round(share * WIDTH) :].T
    projection = kept @ kept.T
    x = harmful.numpy() @ projection
    targets = np.ones((len(x), 1)) @ direction.numpy()[None]
    inverse = np.linalg.pinv(x.T @ x + PENALTY * projection)
    found: np.ndarray = projection @ inverse @ x.T @ targets
    return found


@pytest.mark.parametrize("share", [0.25, 0.5])
def test_it_is_the_papers_update_and_that_has_rank_one(share: float) -> None:
    benign, harmful = drawn(200, 0), drawn(60, 1) + 1.0
    direction = torch.randn(WIDTH, generator=torch.Generator().manual_seed(2)).double()
    theirs = papers_update(benign, harmful, direction, share)
    values = np.linalg.svd(theirs, compute_uv=False)
    assert values[1] / values[0] < 1e-12
    read = ridge_of_one(moments(harmful), null_basis(moments(benign).gram, share), PENALTY)
    ours = torch.outer(read, direction).numpy()
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-12)


def test_its_read_row_is_ridge_regression_of_one_inside_the_basis() -> None:
    benign, harmful = drawn(200, 0), drawn(60, 1) + 1.0
    basis = null_basis(moments(benign).gram, 0.5)
    read = ridge_of_one(moments(harmful), basis, PENALTY)
    inside = harmful @ basis  # least squares with √λ·I below it
    stacked = torch.cat([inside, PENALTY**0.5 * torch.eye(basis.shape[1], dtype=torch.float64)])
    wanted = torch.cat([torch.ones(60), torch.zeros(basis.shape[1])]).double()
    solution = torch.linalg.lstsq(stacked, wanted).solution
    torch.testing.assert_close(read, basis @ solution, rtol=0, atol=1e-12)


def test_an_exact_null_space_leaves_its_states_alone_and_a_larger_share_does_not() -> None:
    benign, harmful = drawn(200, 0, dimensions=12), drawn(60, 1) + 1.0
    gram, steered = moments(benign).gram, moments(harmful)
    within = ridge_of_one(steered, null_basis(gram, 0.5), PENALTY)
    assert float((benign @ within).abs().max()) < 1e-13
    beyond = ridge_of_one(steered, null_basis(gram, 0.75), PENALTY)
    assert float((benign @ beyond).pow(2).mean().sqrt()) > 1e-3


TEXTS = LabelledSet.of(
    [Labelled(f"{word} number {n}", "calm") for n in range(10) for word in ("day", "sea")]
    + [Labelled(f"!! {word} {n} ??", "loud") for n in range(10) for word in ("go", "run")]
)


def fitted(engine: TransformersEngine, **options: Any) -> Any:
    rows = {n: torch.randn(32, generator=torch.Generator().manual_seed(n)) for n in range(3)}
    vector = ControlVector.of(rows, name="up", default_layers=(1, 2))
    arguments: dict[str, Any] = {"name": "a", "vector": vector, "steer": "loud", **options}
    return fit_alphasteer(engine, TEXTS, **arguments)


def test_what_is_served_is_a_multiple_of_the_vector_token_by_token(
    lively: TransformersEngine,
) -> None:
    adapter = fitted(lively, layers=[1], tokens="all", where="all", penalty=(0.01,))
    plan = plans_of(lively, MemoryLibrary(low_ranks={"a": adapter})).plan(
        parse_spec({"interventions": [{"kind": "low_rank", "adapter": "a"}]})
    )
    point = HookPoint(1)
    tokens = lively.tokenizer.encode("!! run 3 ??")
    before, after = (
        lively.capture(CaptureRequest([tokens], (point,), plans=[one]))[0].states[point]
        for one in (None, plan)
    )
    vector = torch.randn(32, generator=torch.Generator().manual_seed(1))
    change = after - before
    along = change @ vector / vector.norm() ** 2
    torch.testing.assert_close(change, along[:, None] * vector, rtol=0, atol=1e-4)
    assert float(along[-4:].mean()) > 0.3


def test_the_card_says_how_much_of_the_vector_others_get(lively: TransformersEngine) -> None:
    card = fitted(lively, alone_tokens="last", null_share=(0.3, 0.6)).card
    assert (card.kind, card.layers, card.site) == ("low_rank", (1, 2), "resid_post")
    assert card.default_where == where_named("onward")
    assert card.provenance["null_share"] == {"1": 0.3, "2": 0.6}
    for one in card.provenance["coefficients"].values():
        assert one["steered_last_mean"] > one["left_alone_last_rms"] > 0
    done: list[int] = []
    fitted(lively, progress=done.append)
    assert sum(done) == len(TEXTS)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"steer": "shy"}, "unknown_label"),
        ({"null_share": (0.1, 0.2, 0.3)}, "invalid_option"),
        ({"layers": [9]}, "layer_out_of_range"),
        ({"vector": ControlVector.of({1: torch.ones(7)})}, "wrong_width"),
    ],
)
def test_what_cannot_be_fitted_is_refused(
    engine: TransformersEngine, options: dict[str, Any], code: str
) -> None:
    with pytest.raises(SteerError) as caught:
        fitted(engine, **options)
    assert caught.value.code == code
