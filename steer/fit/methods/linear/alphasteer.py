"""A direction added only where a prompt calls for it, in closed form (AlphaSteer, 2506.07022).

    x ← x + ⟨q, x⟩·r

with the direction r given, and q fitted so that ⟨q, x⟩ is near 1 on the prompts to steer and near 0
on those to leave alone. Q is a basis of the directions in which the latter have least: the last
ρ·d eigenvectors of their second moment. In it q is the ridge regression of the constant 1 on the
states to steer,

    q = Q (QᵀXᵀXQ + λI)⁻¹ QᵀΣx,

which is the paper's Δ = P(XᵀX + λP)⁺Xᵀ1rᵀ = q rᵀ with P = QQᵀ: its rank is 1, so a `LowRankAdapter`
of rank 1 holds it. Every token is read by itself, as in the paper's formula. (The authors' code
reads a prompt's last token and adds what it says to the tokens before it, which no engine can that
computes prompts in pieces or keeps their caches.)

With ρ·d no greater than the dimensions that the states leave empty, ⟨q, x⟩ is 0 on them; above it
it is not, and the card says what it is. Memory per layer: two second moments, 2·d² float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from steer.artefacts.adapter_parts import EditRows
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.engines.base import Engine
from steer.errors import IncompatibleArtefact, SteerError
from steer.fit.data.labels import Labelled, LabelledSet
from steer.fit.data.prompt import positions_json
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.methods.linear.moments import Moments
from steer.fit.methods.linear.reading import TokensRead, positions_of
from steer.fit.methods.one_vs_rest import check_labels, split_labels
from steer.fit.methods.separation import RunningMoments
from steer.fit.states import Progress, Reading, make_reading, read_tokens


def fit_alphasteer(
    engine: Engine,
    texts: LabelledSet,
    *,
    name: str,
    vector: ControlVector,
    steer: str,
    layers: Sequence[int] | None = None,
    tokens: TokensRead = "last",
    alone_tokens: TokensRead = "all",
    null_share: Sequence[float] = (0.5,),
    penalty: Sequence[float] = (10.0,),
    where: WhereName = "onward",
    held_out: float = 0.2,
    seed: int = 0,
    batch: int = 16,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> LowRankAdapter:
    """`vector` where a text is of the class `steer`, and nothing where it is of another.

    `layers` are by default those that the vector acts on. `null_share` is ρ and `penalty` λ, one
    for all layers or one for each. Of a text to steer the states of `tokens` are rows, of one to
    leave alone those of `alone_tokens`; texts to leave alone should have answers where the edit is
    to act on answers too. The card's `coefficients` have, by layer, what ⟨q, x⟩ is on texts that
    were held out (a share `held_out` of each class, drawn with `seed`): 1 is the whole vector.
    `progress` is told of every text read. Raises `SteerError`.
    """
    check_labels(texts, [steer])
    chosen = tuple(sorted(vector.card.used_layers if layers is None else set(layers)))
    site = vector.card.site
    steered, alone = (
        make_reading(
            engine, site=site, layers=chosen, positions=positions_of(read), batch=batch, at=at
        )
        for read, at in ((tokens, "/tokens"), (alone_tokens, "/alone_tokens"))
    )
    classes = _Classes(engine, steer, steered, alone, progress)
    check_width(engine, vector)
    rows = {layer: vector[layer].double() for layer in steered.layers}
    shares = by_layer(null_share, steered.layers, "null_share")
    penalties = by_layer(penalty, steered.layers, "penalty")
    fitted, measured = split_labels(texts, held_out, seed)
    reads = {}
    for layer, (null, towards) in _moments(classes, fitted).items():
        basis = null_basis(null.gram, shares[layer])
        reads[layer] = ridge_of_one(towards, basis, penalties[layer])
    found = _coefficients(classes, measured, reads)
    return LowRankAdapter.of(
        {n: EditRows(q[None], rows[n][None], torch.zeros(1)) for n, q in reads.items()},
        name=name,
        model=engine.info.own_name,
        site=site,
        default_where=where_named(where),
        description=description,
        licence=licence,
        provenance={
            "method": "alphasteer",
            "data_sha256": texts.sha256,
            "steer": steer,
            "vector": vector.card.name,
            "vector_sha256": vector.sha256,
            "tokens": positions_json(tokens),
            "alone_tokens": positions_json(alone_tokens),
            "null_share": {str(n): shares[n] for n in reads},
            "penalty": {str(n): penalties[n] for n in reads},
            "texts": len(texts),
            "held_out_texts": 0 if len(fitted) == len(texts) else len(measured),
            "coefficients": {str(n): one.as_json() for n, one in found.items()},
            "seed": seed,
            **made_on(engine),
        },
    )


def null_basis(gram: Tensor, share: float) -> Tensor:
    """The `share` of directions in which states with the second moment `gram` `[d, d]` have least:
    orthonormal columns `[d, k]`, at least one."""
    width = len(gram)
    least: Tensor = torch.linalg.eigh(gram).eigenvectors  # in ascending order
    return least[:, : max(1, round(share * width))]


def ridge_of_one(steered: Moments, basis: Tensor, penalty: float) -> Tensor:
    """q `[d]` in the span of `basis` `[d, k]` that minimises Σ(⟨q, x⟩ − 1)² + penalty·‖q‖²."""
    inner = basis.T @ steered.gram @ basis
    inner.diagonal().add_(penalty)
    found: Tensor = basis @ torch.linalg.solve(inner, basis.T @ steered.total)
    return found


@dataclass
class Coefficients:
    """⟨q, x⟩ on the tokens of both classes, and on their prompts' last tokens."""

    alone: RunningMoments
    steered: RunningMoments
    alone_last: RunningMoments
    steered_last: RunningMoments

    @staticmethod
    def none() -> Coefficients:
        return Coefficients(*(RunningMoments() for _ in range(4)))

    def add(self, values: Tensor, steered: bool) -> None:
        """Takes those of one prompt, in order."""
        (self.steered if steered else self.alone).add(values)
        (self.steered_last if steered else self.alone_last).add(values[-1:])

    def as_json(self) -> dict[str, float]:
        return {
            "left_alone_rms": _rms(self.alone),
            "left_alone_last_rms": _rms(self.alone_last),
            "steered_mean": round(self.steered.mean, 6),
            "steered_last_mean": round(self.steered_last.mean, 6),
        }


def _rms(values: RunningMoments) -> float:
    """√E[c²], to six digits: it may be as small as rounding."""
    mean_square = values.mean**2 + (values.squares / values.count if values.count else 0.0)
    return float(f"{math.sqrt(mean_square):.6g}")


@dataclass(frozen=True)
class _Classes:
    """How the states of texts are read, by whether they are of the class to steer."""

    engine: Engine
    steer: str
    steered: Reading
    alone: Reading
    progress: Progress | None

    def read(self, texts: Sequence[Labelled]) -> Iterator[tuple[bool, dict[int, Tensor]]]:
        """Of each text, whether it is one to steer, and its states `[tokens, d]` by layer."""
        for steered, reading in ((False, self.alone), (True, self.steered)):
            mine = [one.prompt for one in texts if (one.label == self.steer) is steered]
            for _, rows in read_tokens(self.engine, mine, reading):
                yield steered, rows
                if self.progress is not None:
                    self.progress(1)


def _moments(classes: _Classes, texts: Sequence[Labelled]) -> dict[int, tuple[Moments, Moments]]:
    """By layer, of the texts to leave alone and of those to steer."""
    width = classes.engine.info.width(classes.steered.site)
    found = {layer: (Moments(width), Moments(width)) for layer in classes.steered.layers}
    for steered, states in classes.read(texts):
        for layer, rows in states.items():
            found[layer][steered].add(rows)
    return found


def _coefficients(
    classes: _Classes, texts: Sequence[Labelled], reads: Mapping[int, Tensor]
) -> dict[int, Coefficients]:
    found = {layer: Coefficients.none() for layer in reads}
    for steered, states in classes.read(texts):
        for layer, rows in states.items():
            found[layer].add(rows.double() @ reads[layer], steered)
    return found


def by_layer(values: Sequence[float], layers: Sequence[int], what: str) -> dict[int, float]:
    """One value for each layer, of one for all or one for each. Raises `SteerError`."""
    if len(values) not in (1, len(layers)):
        raise SteerError(
            f"{what} is one number for all layers, or one for each of the {len(layers)}; "
            f"got {list(values)!r}",
            param=f"/{what}",
            code="invalid_option",
        )
    each = list(values) * len(layers) if len(values) == 1 else list(values)
    return dict(zip(layers, each, strict=True))


def check_width(engine: Engine, vector: ControlVector) -> None:
    """Raises `IncompatibleArtefact` where `vector` is not as wide as the model's states."""
    width: Any = engine.info.width(vector.card.site)
    if vector.card.width != width:
        raise IncompatibleArtefact(
            f"the vector {vector.card.name!r} has width {vector.card.width} and the model's states "
            f"{width} at {vector.card.site}: give one that was made for {engine.info.name!r}",
            code="wrong_width",
        )
