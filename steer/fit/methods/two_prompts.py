"""The vector between two prompts' states (2502.13656): the least data that steers.

Memory: two prompts' states on all layers.
"""

from __future__ import annotations

from collections.abc import Sequence

from steer.artefacts.control_vector import ControlVector, LayerMeasure
from steer.engines.base import Engine
from steer.errors import SteerError
from steer.fit.data.jsonl import sha256_of
from steer.fit.data.prompt import Positions, Prompt, positions_json, prompt_json
from steer.fit.data.where import WhereName, where_named
from steer.fit.methods.card import made_on
from steer.fit.states import Progress, make_reading, read_rows
from steer.spec import Site


def fit_two_prompts(
    engine: Engine,
    *,
    name: str,
    toward: Prompt,
    away: Prompt,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    positions: Positions = "last",
    where: WhereName = "last",
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> ControlVector:
    """`toward`'s state minus `away`'s on every layer; strength 1 leads from one to the other.

    One pair has no variance, so the card records both projections and no separation, and every
    layer is a default layer: choose one by `steer sweep`. Raises `SteerError`.
    """
    reading = make_reading(engine, site=site, layers=layers, positions=positions)
    default_where = where_named(where)
    states = read_rows(engine, [toward, away], reading)
    if progress is not None:
        progress(2)
    rows = {layer: pair[0] - pair[1] for layer, pair in states.items()}
    rows = {layer: row for layer, row in rows.items() if bool(row.any())}
    if not rows:
        raise SteerError(
            "the two prompts have the same state on every layer asked for: read a later layer",
            code="no_difference",
        )
    measures = {}
    for layer, row in rows.items():
        projections = states[layer] @ (row / row.norm())
        measures[layer] = LayerMeasure(
            positive=float(projections[0]),
            negative=float(projections[1]),
            residual_norm=float(states[layer].norm(dim=-1).mean()),
        )
    return ControlVector.of(
        rows,
        name=name,
        model=engine.info.own_name,
        site=site,
        default_where=default_where,
        description=description,
        licence=licence,
        measures=measures,
        provenance={
            "method": "two_prompts",
            "data_sha256": sha256_of([prompt_json(toward), prompt_json(away)]),
            "positions": positions_json(positions),
            **made_on(engine),
        },
    )
