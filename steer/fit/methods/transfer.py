"""A vector from one model for another, by the states both have on the same prompts.

Two maps from the source's space to the target's, each fitted on centred states of the anchors:

- `procrustes`: the rotation (between spaces of different width: the partial isometry) and scale
  nearest to the data, M = scale · U Vᵀ from the SVD of SᵀT.
- `anchors`: the vector as a sum of the source's anchors, least squares with a ridge, and the same
  sum of the target's anchors (parallel anchors; relative representations, 2209.15430).

Models without a common geometry give a map that fits the anchors and nothing else, so the error on
*other* prompts is measured and goes onto the card. Memory: prompts · d floats of both models per
layer, and d_source · d_target.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeAlias

import torch
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.jsonl import sha256_of
from steer.fit.data.prompt import Positions, Prompt, positions_json, prompt_json
from steer.fit.methods.card import made_on, split
from steer.fit.states import Progress, make_reading, read_rows
from steer.spec import Site

Map: TypeAlias = Callable[[Tensor], Tensor]
"""Takes directions `[n, d_source]` to `[n, d_target]`, float64."""

MIN_ANCHORS = 8


def relative(states: Tensor, anchors: Tensor) -> Tensor:
    """The cosine of each of `states` `[n, d]` to each of `anchors` `[m, d]`, both measured from the
    anchors' mean: what a model says of a state in a language that rotation and scale leave alone.
    """
    centre = anchors.mean(0)
    return torch.nn.functional.normalize(states - centre, dim=-1) @ (
        torch.nn.functional.normalize(anchors - centre, dim=-1).T
    )


def procrustes(source: Tensor, target: Tensor) -> Map:
    """The map nearest to taking `source` `[n, d1]` to `target` `[n, d2]`, both centred here."""
    s, t = (states.double() - states.double().mean(0) for states in (source, target))
    u, values, v = torch.linalg.svd(s.T @ t, full_matrices=False)
    scale = values.sum() / s.pow(2).sum().clamp_min(torch.finfo(torch.float64).tiny)
    matrix = scale * (u @ v)
    return lambda rows: rows.double() @ matrix


def anchors(source: Tensor, target: Tensor, *, ridge: float = 1e-3) -> Map:
    """The map by anchors: `ridge` is relative to the mean squared length of the source's."""
    s, t = (states.double() - states.double().mean(0) for states in (source, target))
    price = ridge * s.pow(2).sum() / len(s)
    gram = s.T @ s + price * torch.eye(s.shape[1], dtype=torch.float64)
    matrix = torch.linalg.solve(gram, s.T @ t)
    return lambda rows: rows.double() @ matrix


MAPS: Mapping[str, Callable[[Tensor, Tensor], Map]] = MappingProxyType(
    {"procrustes": procrustes, "anchors": anchors}
)


@dataclass(frozen=True)
class TransferError:
    """How well the map does on states it was not fitted on: the mean cosine between the mapped and
    the true deviation from the mean, and 1 − the squared error over the squared deviation."""

    cosine: float
    explained: float


def transfer_error(
    source: Tensor, target: Tensor, found: Map, centres: Sequence[Tensor]
) -> TransferError:
    """The error of `found` on `source` `[n, d1]` and `target` `[n, d2]`; `centres` are the means
    of the states it was fitted on."""
    mapped, true = found(source.double() - centres[0]), target.double() - centres[1]
    cosine = torch.cosine_similarity(mapped, true, dim=-1).mean()
    missed = (mapped - true).pow(2).sum() / true.pow(2).sum()
    return TransferError(float(cosine), float(1 - missed))


def transfer(
    source: Engine,
    target: Engine,
    vector: ControlVector,
    prompts: Sequence[Prompt],
    *,
    name: str,
    method: str = "procrustes",
    layers: Mapping[int, int] | None = None,
    positions: Positions = "last",
    held_out: float = 0.2,
    seed: int = 0,
    batch: int = 16,
    progress: Progress | None = None,
) -> ControlVector:
    """`vector` of the model in `source` as a vector of the model in `target`.

    `layers` maps the vector's layers to the target's; by default to the same relative depth.
    The card records, per layer, the map's error on the share `held_out` of the prompts. `progress`
    is told of every prompt read, once per model. Raises `SteerError`.
    """
    if method not in MAPS:
        raise SteerError(
            f"there is no map {method!r}: use one of {', '.join(MAPS)}", code="unknown_method"
        )
    placed = layers if layers is not None else same_depth(vector, source, target)
    fitted, measured = split(list(prompts), held_out, seed)
    if len(fitted) < MIN_ANCHORS:
        raise SteerError(
            f"{len(fitted)} anchors fix no map: give at least {MIN_ANCHORS} prompts",
            code="no_prompts",
        )
    order = fitted + (measured if measured != fitted else [])
    site = vector.card.site
    mine = _read(source, order, tuple(placed), site, positions, batch, progress)
    theirs = _read(target, order, tuple(placed.values()), site, positions, batch, progress)
    rows: dict[int, Tensor] = {}
    errors: dict[str, dict[str, float]] = {}
    for layer, place in placed.items():
        s, t = mine[layer][: len(fitted)], theirs[place][: len(fitted)]
        found = MAPS[method](s, t)
        rows[place] = found(vector[layer][None])[0].float()
        tested = slice(len(fitted), None) if len(order) > len(fitted) else slice(None)
        centres = (s.double().mean(0), t.double().mean(0))
        error = transfer_error(mine[layer][tested], theirs[place][tested], found, centres)
        errors[str(place)] = {
            "cosine": round(error.cosine, 4),
            "explained": round(error.explained, 4),
        }
    defaults = vector.card.default_layers
    return ControlVector.of(
        rows,
        name=name,
        model=target.info.own_name,
        site=site,
        default_layers=tuple(sorted(placed[n] for n in defaults or () if n in placed)) or None,
        default_strength=vector.card.default_strength,
        default_where=vector.card.default_where,
        description=vector.card.description,
        licence=vector.card.licence,
        provenance={
            "method": f"transfer/{method}",
            "vector": {"name": vector.card.name, "sha256": vector.sha256},
            "from": {"model": source.info.own_name, "architecture": source.info.architecture},
            "layers": {str(layer): place for layer, place in placed.items()},
            "data_sha256": sha256_of([prompt_json(prompt) for prompt in prompts]),
            "anchors": len(fitted),
            "held_out": len(order) - len(fitted),
            "transfer_error": errors,
            "positions": positions_json(positions),
            "seed": seed,
            **made_on(target),
        },
    )


def same_depth(vector: ControlVector, source: Engine, target: Engine) -> dict[int, int]:
    """Each of the vector's layers at the same relative depth of the target, no place twice."""
    ratio = (target.info.n_layers - 1) / max(source.info.n_layers - 1, 1)
    found: dict[int, int] = {}
    for layer in sorted(vector.directions):
        place = round(layer * ratio)
        if place not in found.values():
            found[layer] = place
    return found


def _read(
    engine: Engine,
    prompts: Sequence[Prompt],
    layers: tuple[int, ...],
    site: Site,
    positions: Positions,
    batch: int,
    progress: Progress | None,
) -> dict[int, Tensor]:
    reading = make_reading(
        engine,
        site=site,
        layers=layers,
        positions=positions,
        batch=batch,
    )
    parts: dict[int, list[Tensor]] = {layer: [] for layer in layers}
    for first in range(0, len(prompts), batch):
        group = prompts[first : first + batch]
        for layer, states in read_rows(engine, group, reading).items():
            parts[layer].append(states)
        if progress is not None:
            progress(len(group))
    return {layer: torch.cat(states) for layer, states in parts.items()}
