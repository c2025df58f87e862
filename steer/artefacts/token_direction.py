"""Directions along which a lens reads a token, one for each layer.

A lens reads a state h as logits W_U·(γ ⊙ n(M h + b))·1/σ, where M is the layer's map, n takes the
mean away where the final norm does, and σ is what that norm divides by. A logit counts against the
mean of all, which moves no probability. Its gradient before the division is the constant row
Mᵀ n(γ ⊙ (W_U[t] − w̄)): the token's row of the output matrix less the mean row, with the norm's
scale folded in, taken back through the map. M is 1 for the logit lens, 1 + A for a tuned one
(2303.08112), J for a Jacobian lens. Kept at length one.
"""

from __future__ import annotations

import hashlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.lens import Lens
from steer.errors import IncompatibleArtefact, SpecError, Unsupported
from steer.model import ModelInfo
from steer.spec import Site

ReadToken: TypeAlias = Callable[[int | str], tuple[int, Tensor]]
"""A token of the model, by its id or its text, to its id and its row `[d_model]` of the output
matrix less the mean row, with the final norm's scale folded in. Raises `SteerError`, pointing at
`/token`."""

STREAM_SITES: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post")
"""The sites of the residual stream, which the logit lens reads."""


class TokenDirection(ControlVector):
    """The rows of one token. Its identity is what they are made of, lens, token and site, and not
    how a model is called or the last bit of a product rounded: replicas of a server call it alike.
    """

    @cached_property
    def sha256(self) -> str:
        said = self.card.model_dump_json(exclude={"name", "model"})
        return hashlib.sha256(b"steer/token/1\n" + said.encode()).hexdigest()


class TokenDirections:
    """The directions of a model's tokens; those asked for last are kept.

    Guarantees: safe from any thread; the same token, lens and site give the same vector.
    """

    def __init__(self, model: ModelInfo, read: ReadToken, *, size: int = 64) -> None:
        self._model, self._read, self._size = model, read, size
        self._kept: OrderedDict[tuple[object, ...], ControlVector] = OrderedDict()
        self._lock = threading.Lock()

    def vector(self, token: int | str, lens: Lens | None, site: Site) -> ControlVector:
        """The token's unit directions at `site` of every layer that the lens has a map for there;
        of the logit lens (None) one row, which serves every layer.

        Raises `SteerError`, with a pointer below the object that names the token and the lens, or
        `/site`.
        """
        number, row = self._read(token)
        key = number, None if lens is None else lens.sha256, site
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
        made = token_vector(number, row, lens, site, self._model)
        with self._lock:
            self._kept[key] = made
            while len(self._kept) > self._size:
                self._kept.popitem(last=False)
        return made


def token_vector(
    token: int, row: Float[Tensor, " d_model"], lens: Lens | None, site: Site, model: ModelInfo
) -> TokenDirection:
    """See `TokenDirections.vector`; `row` is the token's, as `ReadToken` gives it."""
    _check_site(lens, site)
    source = lens.sha256 if lens is not None else None
    card: dict[str, Any] = {
        "name": f"token {token}" + ("" if lens is None else f" of the lens {lens.card.name}"),
        "model": model.own_name,
        "site": site,
        "provenance": {"method": "token", "token": token, "lens": source},
    }
    if lens is None:
        return _made({model.n_layers - 1: _unit(row, token)}, card)
    try:
        lens.check_fits(model)
    except IncompatibleArtefact as error:
        raise error.at("/lens") from None
    rows = {
        layer: _unit(lens.pulled_back(row[None], layer, site)[0], token)
        for layer in range(model.n_layers)
        if lens.reads(layer, site)
    }
    return _made(rows, card)


def _made(rows: Mapping[int, Tensor], card: Mapping[str, Any]) -> TokenDirection:
    checked = ControlVector.of(rows, **card)
    return TokenDirection(checked.directions, checked.card)


def _check_site(lens: Lens | None, site: Site) -> None:
    sites = STREAM_SITES if lens is None else ("resid_post", "resid_pre")
    if site not in sites:
        reads = "the logit lens reads" if lens is None else f"the lens {lens.card.name!r} reads"
        raise Unsupported(
            f"{reads} the residual stream, and a token has no direction at {site!r}: use "
            + " or ".join(sites),
            code="unsupported_site",
            param="/site",
        )


def _unit(row: Tensor, token: int) -> Tensor:
    exact = row.double()
    length = exact.norm()
    if not bool(length.isfinite()) or length <= torch.finfo(torch.float32).tiny:
        raise SpecError(
            f"the token {token} has no direction here: its row of the output matrix, through the "
            "lens, is zero or not finite; name another token",
            code="no_direction",
            param="/token",
        )
    unit: Tensor = (exact / length).float()
    return unit
