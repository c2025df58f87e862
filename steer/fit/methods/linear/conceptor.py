"""A soft projection on the states of a concept, as a few rank-1 edits (conceptors, 2410.16314).

    x ← x + β·C x,   C = R(R + a⁻²I)⁻¹,   R = XᵀX/n

C has the eigenvectors u_i of R, and the eigenvalues μ_i = s_i/(s_i + a⁻²) where R has s_i: near 1
for directions that the concept's states fill, near 0 for those they do not, with the aperture a for
where that turns. It has as many as the states have dimensions. An adapter holds the `rank` largest,
and how much of C that leaves out, ‖C − C_k‖/‖C‖, is on the card; a rank that leaves out more than
`max_error` is refused. Memory per layer: the second moment, d² float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.control_vector import LowRankAdapter
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.jsonl import sha256_of
from steer.fit.data.prompt import Prompt, positions_json, prompt_json
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.methods.linear.moments import Moments
from steer.fit.methods.linear.reading import TokensRead, positions_of
from steer.fit.states import Progress, make_reading, read_tokens
from steer.spec import Site


@dataclass(frozen=True)
class Conceptor:
    """Unit rows u `[d, d]` and their values μ `[d]`, largest first."""

    rows: Tensor
    values: Tensor

    @staticmethod
    def of(second_moment: Tensor, aperture: float) -> Conceptor:
        """C from R `[d, d]`."""
        found = torch.linalg.eigh(second_moment)
        spectrum = found.eigenvalues.clamp_min(0.0).flip(0)
        return Conceptor(found.eigenvectors.T.flip(0), spectrum / (spectrum + aperture**-2))

    def error(self, rank: int) -> float:
        """‖C − C_k‖/‖C‖ with k = `rank`."""
        squares = self.values.square()
        return float((squares[rank:].sum() / squares.sum()).sqrt())

    def rank_within(self, error: float) -> int:
        """The smallest rank whose error is at most `error`."""
        squares = self.values.square()
        left = squares.sum() - squares.cumsum(0)
        enough = left <= error**2 * squares.sum()
        return int(enough.int().argmax()) + 1

    def edits(self, rank: int) -> EditRows:
        """x + C_k x."""
        rows = self.rows[:rank]
        return EditRows(self.values[:rank, None] * rows, rows, torch.zeros(rank))


def fit_conceptor(
    engine: Engine,
    prompts: Sequence[Prompt],
    *,
    name: str,
    layers: Sequence[int],
    aperture: float = 0.1,
    rank: int | None = None,
    max_error: float = 0.1,
    site: Site = "resid_post",
    tokens: TokensRead = "all",
    where: WhereName = "all",
    batch: int = 16,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> LowRankAdapter:
    """The conceptor of the states of `prompts`; β is the adapter's strength.

    Without a `rank`, each layer has the smallest that leaves out at most `max_error`. `progress` is
    told of every prompt. Raises `SteerError`, for a `rank` that leaves out more as well
    (`rank_too_small`).
    """
    reading = make_reading(
        engine,
        site=site,
        layers=layers,
        positions=positions_of(tokens),
        batch=batch,
        at="/tokens",
    )
    default_where = where_named(where)
    width = engine.info.width(site)
    if aperture <= 0 or not 0 < max_error < 1 or not (rank is None or 1 <= rank <= width):
        raise SteerError(
            f"an aperture ({aperture!r}) is above 0, max_error ({max_error!r}) between 0 and 1, "
            f"and a rank ({rank!r}) from 1 to {width}",
            code="invalid_option",
        )
    moments = {layer: Moments(width) for layer in reading.layers}
    for _, states in read_tokens(engine, prompts, reading):
        for layer, rows in states.items():
            moments[layer].add(rows)
        if progress is not None:
            progress(1)
    found = {n: Conceptor.of(one.gram / one.count, aperture) for n, one in moments.items()}
    ranks = {n: rank or one.rank_within(max_error) for n, one in found.items()}
    for layer, one in found.items():
        _check_rank(layer, one, ranks[layer], max_error)
    return LowRankAdapter.of(
        {layer: one.edits(ranks[layer]) for layer, one in found.items()},
        name=name,
        model=engine.info.own_name,
        site=site,
        default_where=default_where,
        description=description,
        licence=licence,
        provenance={
            "method": "conceptor",
            "data_sha256": sha256_of([prompt_json(one) for one in prompts]),
            "prompts": len(prompts),
            "tokens": positions_json(tokens),
            "aperture": aperture,
            "ranks": {str(n): k for n, k in ranks.items()},
            "errors": {str(n): round(found[n].error(k), 4) for n, k in ranks.items()},
            "quota": {str(n): round(float(one.values.mean()), 4) for n, one in found.items()},
            **made_on(engine),
        },
    )


def _check_rank(layer: int, one: Conceptor, rank: int, max_error: float) -> None:
    error = one.error(rank)
    if error > max_error:
        raise SteerError(
            f"layer {layer}: a rank of {rank} leaves out {error:.0%} of the conceptor: give a rank "
            f"of at least {one.rank_within(max_error)}, a smaller aperture, or allow more with "
            "max_error",
            param="/rank",
            code="rank_too_small",
        )
