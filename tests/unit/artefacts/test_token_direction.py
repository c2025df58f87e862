"""The direction of a token is the gradient of its logit, as the lens reads it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from artefacts import random_jacobians, random_lens, shape_of
from torch import Tensor

from steer.artefacts.lens import Lens
from steer.artefacts.token_direction import TokenDirections, token_vector
from steer.errors import IncompatibleArtefact, SpecError, SteerError, Unsupported
from steer.spec import Site

LAYERS, WIDTH = 4, 16
MODEL = shape_of(WIDTH, LAYERS)
LENSES = {
    "logit": None,
    "tuned": random_lens(1, LAYERS, WIDTH),
    "jacobian": random_jacobians(2, LAYERS, WIDTH),
}


def draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def read(lens: Lens | None, state: Tensor, layer: int, site: Site) -> Tensor:
    """The state after the lens's map, in float64."""
    found = None if lens is None else lens.translator(layer, site)
    if found is None:
        return state
    mapped = found.weight.double() @ state
    return mapped if found.bias is None else state + mapped + found.bias.double()


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("site", ["resid_post", "resid_pre"])
@pytest.mark.parametrize("name", LENSES)
def test_it_is_the_gradient_of_the_logit_before_the_norm_divides(
    name: str, site: Site, centred: bool
) -> None:
    lens, gain, row, bias = LENSES[name], draw(3, WIDTH), draw(4, WIDTH), draw(5, WIDTH)
    folded = gain * row - (gain * row).mean() * centred
    vector = token_vector(7, folded.float(), lens, site, MODEL)
    for layer in range(LAYERS):
        if lens is not None and not lens.reads(layer, site):
            assert layer not in vector.directions
            continue
        state = draw(10 + layer, WIDTH).requires_grad_()
        mapped = read(lens, state, layer, site)
        moved = mapped - mapped.mean() if centred else mapped
        divisor = moved.square().mean().sqrt().detach()
        logit = row @ (gain * moved / divisor + bias)
        (gradient,) = torch.autograd.grad(logit * divisor - divisor * (row @ bias), state)
        found = vector.directions.get(layer, next(iter(vector.directions.values())))
        torch.testing.assert_close(found.double(), gradient / gradient.norm(), rtol=1e-5, atol=1e-6)
        assert float(found.norm()) == pytest.approx(1.0, abs=1e-6)


def test_the_logit_lens_needs_one_row_and_others_have_one_for_each_map() -> None:
    row = draw(0, WIDTH).float()
    assert len(token_vector(1, row, None, "resid_mid", MODEL).directions) == 1
    tuned = token_vector(1, row, LENSES["tuned"], "resid_post", MODEL)
    assert list(tuned.directions) == [0, 1, 2, 3]
    sparse = Lens.of_jacobians({3: torch.eye(WIDTH), 1: torch.eye(WIDTH)})
    assert list(token_vector(1, row, sparse, "resid_post", MODEL).directions) == [0, 2, 3]
    assert list(token_vector(1, row, sparse, "resid_pre", MODEL).directions) == [1, 3]
    some = Lens.of_jacobians({2: torch.eye(WIDTH)}, depth=LAYERS)
    assert list(token_vector(1, row, some, "resid_post", MODEL).directions) == [1, 3]


@pytest.mark.parametrize(
    ("lens", "site", "says"),
    [
        ("logit", "mlp_out", "resid_pre or resid_mid or resid_post"),
        ("tuned", "resid_mid", "resid_post or resid_pre"),
        ("jacobian", "attn_in", "resid_post or resid_pre"),
    ],
)
def test_other_sites_are_refused(lens: str, site: Site, says: str) -> None:
    with pytest.raises(Unsupported, match=says) as caught:
        token_vector(1, torch.ones(WIDTH), LENSES[lens], site, MODEL)
    assert (caught.value.code, caught.value.param) == ("unsupported_site", "/site")


def test_a_lens_of_another_model_is_refused() -> None:
    with pytest.raises(IncompatibleArtefact, match="blocks") as caught:
        token_vector(1, torch.ones(WIDTH), random_lens(1, LAYERS + 1), "resid_post", MODEL)
    assert caught.value.param == "/lens"


@pytest.mark.parametrize("row", [torch.zeros(WIDTH), torch.full((WIDTH,), float("nan"))])
def test_a_token_without_a_direction_is_refused(row: Tensor) -> None:
    with pytest.raises(SpecError, match="no direction") as caught:
        token_vector(9, row, None, "resid_post", MODEL)
    assert (caught.value.code, caught.value.param) == ("no_direction", "/token")


def test_what_was_asked_for_last_is_kept_and_no_more() -> None:
    asked: list[Any] = []

    def reader(token: int | str) -> tuple[int, Tensor]:
        asked.append(token)
        return (
            (token, draw(token, WIDTH).float()) if isinstance(token, int) else (1, draw(1, WIDTH))
        )

    directions = TokenDirections(MODEL, reader, size=2)
    first = directions.vector(1, None, "resid_post")
    assert directions.vector(1, None, "resid_post") is first
    assert directions.vector(1, LENSES["tuned"], "resid_post") is not first
    assert directions.vector(1, None, "resid_post") is first
    directions.vector(2, None, "resid_post")
    directions.vector(3, None, "resid_post")
    again = directions.vector(1, None, "resid_post")
    assert again is not first
    assert again.sha256 == first.sha256
    assert len(directions._kept) == 2


def test_lens_token_and_site_are_part_of_its_identity() -> None:
    row = torch.ones(WIDTH)
    plain, other = (token_vector(n, row, None, "resid_post", MODEL) for n in (1, 2))
    site = token_vector(1, row, None, "resid_pre", MODEL)
    lens = token_vector(1, row, LENSES["tuned"], "resid_post", MODEL)
    assert len({one.sha256 for one in (plain, other, site, lens)}) == 4
    assert lens.card.provenance["lens"] == LENSES["tuned"].sha256  # type: ignore[union-attr]
    # As two machines may round it.
    again = token_vector(1, row * (1 + 1e-6), LENSES["tuned"], "resid_post", MODEL)
    assert again.sha256 == lens.sha256


def test_errors_of_the_reader_pass() -> None:
    def reader(token: int | str) -> tuple[int, Tensor]:
        raise SteerError("no")

    with pytest.raises(SteerError, match="no"):
        TokenDirections(MODEL, reader).vector(1, None, "resid_post")
