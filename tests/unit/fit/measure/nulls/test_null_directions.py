"""Null vectors: as long and as coherent as the vector, in directions of chance."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError
from steer.fit.measure.answers import answers_under
from steer.fit.measure.nulls.directions import (
    answer_states,
    null_vector,
    null_vectors,
    refit_pairs,
)
from steer.fit.measure.scoring import Score
from steer.fit.methods.method import METHODS

D, LAYERS = 48, (2, 3, 5)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


SHARED = randn(D)
VECTOR = ControlVector.of(
    {layer: (n + 1) * (SHARED + 0.5 * randn(D, seed=layer)) for n, layer in enumerate(LAYERS)},
    name="v",
    model="m",
    default_layers=(3, 5),
    default_strength=0.7,
)
# Half of the variance is along one axis, the same on every layer.
STATES = {layer: randn(64, D, seed=9) * torch.tensor([7.0] + [1.0] * (D - 1)) for layer in LAYERS}
PAIRS = {
    layer: (randn(16, D, seed=1) + 3 * SHARED, randn(16, D, seed=2) - 3 * SHARED)
    for layer in LAYERS
}
MATERIAL: dict[str, Any] = {"states": STATES, "refit": refit_pairs(PAIRS)}
KINDS: list[Any] = ["isotropic", "covariance", "shuffled"]


def unit(vector: ControlVector) -> torch.Tensor:
    rows = torch.stack([vector[layer] for layer in vector.card.layers]).double()
    lengths: torch.Tensor = rows.norm(dim=1, keepdim=True)
    return rows / lengths


@pytest.mark.parametrize("kind", KINDS)
def test_a_null_has_the_norms_and_the_use_of_its_vector(kind: Any) -> None:
    null = null_vector(VECTOR, kind, seed=3, **MATERIAL)
    card = null.vector.card
    assert card.layers == LAYERS
    assert (card.model, card.default_layers, card.default_strength) == ("m", (3, 5), 0.7)
    for layer in LAYERS:
        assert float(null.vector[layer].norm()) == pytest.approx(float(VECTOR[layer].norm()))
    assert null.cosines == pytest.approx(VECTOR.cosine(null.vector), abs=1e-6)
    norms = torch.stack([VECTOR[layer].norm() for layer in LAYERS])
    weighted = (torch.tensor(list(null.cosines.values())) * norms).sum() / norms.sum()
    assert null.cosine == pytest.approx(float(weighted), abs=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_is_one_null(kind: Any) -> None:
    one, again, other = (null_vector(VECTOR, kind, seed=n, **MATERIAL) for n in (1, 1, 2))
    assert one.vector.sha256 == again.vector.sha256
    assert abs(float((unit(one.vector) * unit(other.vector)).sum(1).mean())) < 0.9


def test_a_rotation_keeps_the_angles_between_layers() -> None:
    null = null_vector(VECTOR, "isotropic", seed=0)
    before, after = unit(VECTOR), unit(null.vector)
    assert torch.allclose(before @ before.T, after @ after.T, atol=1e-6)


def test_rotations_point_everywhere_alike() -> None:
    drawn = torch.stack(
        [unit(null_vector(VECTOR, "isotropic", seed=n).vector)[0] for n in range(400)]
    )
    # Of a uniform direction every coordinate has mean 0 and variance 1/d.
    assert float(drawn.mean(0).abs().max()) < 4.5 / (D * 400) ** 0.5
    assert torch.allclose(drawn.square().mean(0), torch.full((D,), 1 / D).double(), atol=0.01)


def test_more_layers_than_dimensions_can_be_turned() -> None:
    narrow = ControlVector.of({n: randn(2, seed=n) for n in range(5)})
    null = null_vector(narrow, "isotropic", seed=0)
    before, after = unit(narrow), unit(null.vector)
    assert torch.allclose(before @ before.T, after @ after.T, atol=1e-6)


def test_a_covariance_null_varies_as_the_states_do() -> None:
    drawn = torch.stack(
        [unit(null_vector(VECTOR, "covariance", seed=n, states=STATES).vector) for n in range(300)]
    )
    along = drawn[:, 0].square().mean(0)
    # As of normal rows with the states' covariance, 49 along the first axis and 1 along the others.
    scale = (STATES[2] - STATES[2].mean(0)).square().mean(0).sqrt()
    normal = randn(20_000, D, seed=4) * scale
    wanted = (normal.square() / normal.square().sum(1, keepdim=True)).mean(0)
    assert float(along[0]) == pytest.approx(float(wanted[0]), abs=0.06)
    assert float(along[1:].max()) < 0.05
    # The states are the same on every layer here, so the null is too.
    assert torch.allclose(drawn[:, 0], drawn[:, 2], atol=1e-6)


def test_a_shift_of_all_states_is_no_covariance() -> None:
    moved = {layer: rows + 100 * SHARED for layer, rows in STATES.items()}
    one = null_vector(VECTOR, "covariance", seed=0, states=STATES)
    two = null_vector(VECTOR, "covariance", seed=0, states=moved)
    assert torch.allclose(unit(one.vector), unit(two.vector), atol=1e-4)


def test_shuffled_labels_are_refitted_with_the_same_swaps_on_every_layer() -> None:
    rows = refit_pairs(PAIRS)(5)
    differences = PAIRS[2][0] - PAIRS[2][1]
    # The mean of ±differences: which pairs were swapped can be read off by solving for them.
    signs = torch.linalg.lstsq(differences.T.double(), 16 * rows[2].double()[:, None]).solution
    assert torch.allclose(signs.abs(), torch.ones_like(signs), atol=1e-3)
    assert int((signs > 0).sum()) == 8
    assert torch.allclose(rows[2], rows[5])


def test_nothing_of_the_attribute_is_left_in_shuffled_labels() -> None:
    """Though the pairs differ in little but the attribute: coins would leave most of it."""
    refit = refit_pairs(PAIRS)
    cosines = [null_vector(VECTOR, "shuffled", seed=n, refit=refit).cosine for n in range(40)]
    assert sum(map(abs, cosines)) / 40 < 0.2  # of random directions: .115
    assert max(map(abs, cosines)) > 0.05
    logistic = refit_pairs(PAIRS, METHODS["logistic"])
    assert abs(null_vector(VECTOR, "shuffled", seed=0, refit=logistic).cosine) < 0.5


def test_as_many_kinds_as_there_is_material_for() -> None:
    assert [n.kind for n in null_vectors(VECTOR, 2)] == ["isotropic"] * 2
    everything = null_vectors(VECTOR, 2, seed=7, layers=(3,), **MATERIAL)
    assert [(n.kind, n.seed) for n in everything] == [(k, s) for k in KINDS for s in (7, 8)]
    assert all(n.vector.card.layers == (3,) for n in everything)
    assert null_vectors(VECTOR, 0, **MATERIAL) == ()
    one = {layer: rows[:1] for layer, rows in STATES.items()}
    assert [n.kind for n in null_vectors(VECTOR, 1, states=one)] == ["isotropic"]


@pytest.mark.parametrize(
    ("kind", "material"),
    [
        ("covariance", {}),
        ("covariance", {"states": {2: STATES[2]}}),
        ("covariance", {"states": {layer: torch.ones(4, D) for layer in LAYERS}}),
        ("shuffled", {}),
        ("shuffled", {"refit": lambda _: {layer: torch.zeros(D) for layer in LAYERS}}),
    ],
)
def test_without_material_there_is_no_null(kind: Any, material: Any) -> None:
    with pytest.raises(SteerError) as caught:
        null_vector(VECTOR, kind, seed=0, **material)
    assert caught.value.code == "no_null_states"


@pytest.mark.parametrize(("pairs", "method"), [(3, "diffmean"), (0, "diffmean"), (16, "pca")])
def test_pairs_that_cannot_be_shuffled_are_refused(pairs: int, method: str) -> None:
    few = {layer: (one[:pairs], two[:pairs]) for layer, (one, two) in PAIRS.items()}
    with pytest.raises(SteerError, match="shuffled") as caught:
        refit_pairs(few, METHODS[method])
    assert caught.value.code == "no_null_states"


def test_states_are_those_of_the_answers(engine: TransformersEngine) -> None:
    sampling = SamplingParams(max_tokens=5, temperature=0, logprobs=0, ignore_eos=True)
    [answers] = answers_under(
        engine, [["one", "two words"]], [None], lambda _: Score(0.0), sampling=sampling
    )
    states = answer_states(engine, answers, "resid_post", (0, 2))
    assert {layer: tuple(rows.shape) for layer, rows in states.items()} == {
        0: (12, 32),
        2: (12, 32),
    }
