"""Null vectors: directions that a vector has to beat before what it does is called steering.

Any large enough push changes what a model says. So a vector is compared with others of its site,
layers and norms whose direction is chance (SteerCheck, 2608.24335), of three kinds, from weak to
strong:

- `isotropic`: the vector itself after a random rotation, the same on every layer. Angles between
  its layers stay; it is nearly orthogonal to whatever the states vary in, which makes it weak.
- `covariance`: a random combination Σ c_i (x_i − x̄), c_i ~ N(0, 1), of states that the model has.
  Its covariance is that of the states, without a matrix of d² numbers.
- `shuffled`: the same fit of the same states on labels shuffled within the pairs.

What is drawn is drawn once for all layers, so that a null is as coherent over them as a fitted
vector is. On each layer it has the vector's norm; one strength then sets how far it goes
(`steer.fit.measure.nulls.matching`).
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.calibration import NullKind
from steer.artefacts.control_vector import ControlVector
from steer.engines.base import CaptureRequest, Engine
from steer.engines.journal import remembered
from steer.errors import SteerError
from steer.fit.measure.answers import Answer
from steer.fit.methods.diffmean import DifferenceOfMeans
from steer.fit.methods.method import MakeMethod
from steer.fit.methods.pca import UncentredPCA
from steer.model import HookPoint
from steer.spec import Site

States: TypeAlias = Mapping[int, Float[Tensor, "n d"]]
"""States by layer; row n is of the same token on every layer."""

PairedStates: TypeAlias = Mapping[int, tuple[Float[Tensor, "n d"], Float[Tensor, "n d"]]]
"""By layer, the states of the positive and of the negative prompts, in pairs."""

Refit: TypeAlias = Callable[[int], Mapping[int, Tensor]]
"""From a seed, the directions by layer that the vector's method finds on shuffled labels."""

MOST_STATES = 1024
"""Tokens that a covariance is drawn from: more add little and hold much."""

_BATCH = 32
_LEAST_PAIRS = 4


@dataclass(frozen=True)
class NullVector:
    """A null of `kind`, drawn with `seed`.

    `cosines` are those to the vector by layer, `cosine` their mean weighted with the norms: a null
    that is half the vector is no null, and should do half of what it does.
    """

    kind: NullKind
    seed: int
    vector: ControlVector
    cosines: Mapping[int, float]
    cosine: float

    @property
    def name(self) -> str:
        return f"{self.kind} {self.seed}"


def null_vectors(
    vector: ControlVector,
    count: int,
    *,
    seed: int = 0,
    layers: Sequence[int] | None = None,
    states: States | None = None,
    refit: Refit | None = None,
) -> tuple[NullVector, ...]:
    """`count` nulls of each kind that there is material for: `isotropic` always, `covariance`
    with `states` of more than one token, `shuffled` with `refit`. Raises `SteerError`."""
    kinds: list[NullKind] = ["isotropic"]
    kinds += ["covariance"] if states and all(len(rows) > 1 for rows in states.values()) else []
    kinds += ["shuffled"] if refit is not None else []
    return tuple(
        null_vector(vector, kind, seed=seed + n, layers=layers, states=states, refit=refit)
        for kind in kinds
        for n in range(count)
    )


def null_vector(
    vector: ControlVector,
    kind: NullKind,
    *,
    seed: int,
    layers: Sequence[int] | None = None,
    states: States | None = None,
    refit: Refit | None = None,
) -> NullVector:
    """A null of `vector` on `layers` (all of them), with its norms and its card's defaults.

    Raises `SteerError` (`no_null_states`) where a kind's material is missing or has no direction.
    """
    real = vector if layers is None else vector.on_layers(layers)
    rows = torch.stack([real[layer] for layer in real.card.layers]).double()
    norms = rows.norm(dim=1)
    if kind == "isotropic":
        drawn = _rotated(rows, _generator(seed, kind))
    elif kind == "covariance":
        drawn = _combined(_by_layer(states, real, kind), _generator(seed, kind))
    else:
        found = _by_layer(None if refit is None else refit(seed), real, kind)
        drawn = torch.stack([row.double() for row in found])
    lengths = drawn.norm(dim=1)
    if not bool((lengths > 0).all()):
        raise SteerError(
            f"the {kind} null has no direction on every layer of the vector: the states it is "
            "drawn from do not differ there",
            code="no_null_states",
        )
    drawn = drawn * (norms / lengths)[:, None]
    cosines = (drawn * rows).sum(1) / norms**2
    card = real.card
    return NullVector(
        kind=kind,
        seed=seed,
        vector=ControlVector.of(
            dict(zip(card.layers, drawn, strict=True)),
            name=f"{card.name or 'vector'} {kind} {seed}",
            model=card.model,
            site=card.site,
            default_layers=card.default_layers,
            default_strength=card.default_strength,
            default_where=card.default_where,
        ),
        cosines=dict(zip(card.layers, cosines.tolist(), strict=True)),
        cosine=float((cosines * norms).sum() / norms.sum()),
    )


def refit_pairs(states: PairedStates, make: MakeMethod = DifferenceOfMeans) -> Refit:
    """The fit by `make` of pairs of which half, drawn anew by each seed, have their sides swapped.

    The same pairs are swapped on every layer. Each side loses its class mean first, and half are
    swapped, no more and no fewer: a coin for every pair would leave some of the attribute, which
    equal KL then blows up to all of it, or to its opposite (with pairs that differ in little else,
    cosines of ±.8). Raises `SteerError` (`no_null_states`) for fewer than four pairs, and for
    `pca`, which finds the same direction whichever side is which.
    """
    count = min((len(one) for one, _ in states.values()), default=0)
    if count < _LEAST_PAIRS or make is UncentredPCA:
        raise SteerError(
            "the labels of 'pca' cannot be shuffled: it finds the same direction whichever side "
            "of a pair is which"
            if make is UncentredPCA
            else f"{count} pairs have too few ways to be shuffled: give at least {_LEAST_PAIRS}",
            code="no_null_states",
        )

    def refit(seed: int) -> dict[int, Tensor]:
        order = torch.randperm(count, generator=_generator(seed, "shuffled"))
        swapped = (order < count // 2)[:, None]
        found = {}
        for layer, sides in states.items():
            positive, negative = (side.double() - side.double().mean(0) for side in sides)
            method = make(positive.shape[1])
            method.add(
                torch.where(swapped, negative, positive), torch.where(swapped, positive, negative)
            )
            found[layer] = method.direction()
        return found

    return refit


def answer_states(
    engine: Engine, answers: Sequence[Answer], site: Site, layers: Sequence[int]
) -> dict[int, Float[Tensor, "n d"]]:
    """The unsteered states of up to `MOST_STATES` tokens of the answers, from the last prompt token
    on: where edits act, and away from a context's first token, whose state is like no other."""
    every = max(1, -(-sum(len(one.tokens) + 1 for one in answers) // MOST_STATES))
    rows = remembered(
        engine,
        ["states", site, list(layers), [(one.prompt, one.tokens) for one in answers]],
        lambda: _read(engine, answers, tuple(HookPoint(layer, site) for layer in layers), every),
    )
    return dict(zip(layers, rows, strict=True))


def _read(
    engine: Engine, answers: Sequence[Answer], points: tuple[HookPoint, ...], every: int
) -> Float[Tensor, "layers n d"]:
    """The states from each prompt's last token on, one of `every` few."""
    found: list[Tensor] = []
    for first in range(0, len(answers), _BATCH):
        group = answers[first : first + _BATCH]
        captured = engine.capture(CaptureRequest([a.prompt + a.tokens for a in group], points))
        for answer, one in zip(group, captured, strict=True):
            states = torch.stack([one.states[point] for point in points])
            found.append(states[:, len(answer.prompt) - 1 :: every].contiguous())
    return torch.cat(found, 1)


def _rotated(rows: Float[Tensor, "L d"], generator: torch.Generator) -> Float[Tensor, "L d"]:
    """The rows after a rotation drawn uniformly from all: their lengths and angles stay."""
    u, s, v = torch.linalg.svd(rows, full_matrices=False)
    gaussian = torch.randn(v.shape[1], v.shape[0], generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    q = q * r.diagonal().sign()  # without it, QR's own signs make the draw less than uniform
    turned: Tensor = (u * s) @ q.T
    return turned


def _combined(states: Sequence[Tensor], generator: torch.Generator) -> Float[Tensor, "L d"]:
    weights = torch.randn(len(states[0]), generator=generator, dtype=torch.float64)
    centred = (rows.double() - rows.double().mean(0) for rows in states)
    return torch.stack([weights @ rows for rows in centred])


def _by_layer(found: Mapping[int, Any] | None, vector: ControlVector, kind: str) -> list[Tensor]:
    """What was found for each of the vector's layers, in their order."""
    missing = [layer for layer in vector.card.layers if layer not in (found or {})]
    if found is None or missing:
        raise SteerError(
            f"a {kind} null needs "
            f"{'states' if kind == 'covariance' else 'a refit'} on the vector's layers "
            f"{list(vector.card.layers)}; there are none on {missing}",
            code="no_null_states",
        )
    return [found[layer] for layer in vector.card.layers]


def _generator(seed: int, kind: str) -> torch.Generator:
    # The kind counts too: nulls of different kinds share no draw.
    return torch.Generator().manual_seed(zlib.crc32(f"{kind} {seed}".encode()))
