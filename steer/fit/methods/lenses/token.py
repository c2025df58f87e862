"""A token's direction through a lens, kept as a vector. Memory: its rows."""

from __future__ import annotations

from collections.abc import Sequence

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.lens import Lens
from steer.artefacts.token_direction import token_vector
from steer.engines.base import Engine
from steer.engines.token_rows import token_reader
from steer.errors import SteerError
from steer.fit.methods.card import made_on
from steer.fit.states import Progress
from steer.plan.points import row
from steer.prompts import token_texts
from steer.spec import Site


def fit_token(
    engine: Engine,
    *,
    name: str,
    token: str | None = None,
    token_id: int | None = None,
    lens: Lens | None = None,
    site: Site = "resid_post",
    layers: Sequence[int] | None = None,
    description: str = "",
    licence: str = "",
    progress: Progress | None = None,
) -> ControlVector:
    """The unit direction of a token, by its text or its id, on every layer that `lens` (None: the
    logit lens) has a map for, or on `layers`.

    Strength 1 adds a length of 1. Without `layers` it acts on the one in the middle by default.
    Raises `SteerError`.
    """
    asked = token if token_id is None else token_id
    if asked is None or (token is not None and token_id is not None):
        raise SteerError(
            "a direction is that of one token: give 'token', its text, or 'token_id'",
            code="invalid_option",
            param="/token",
        )
    try:
        number, read = token_reader(engine, engine.tokenizer)(asked)
        found = token_vector(number, read, lens, site, engine.info)
    except SteerError as error:
        if error.param == "/token" and token_id is not None:
            error.param = "/token_id"
        raise
    everywhere = range(engine.info.n_layers) if lens is None else sorted(found.directions)
    chosen = sorted(set(everywhere if layers is None else layers))
    try:
        rows = {layer: row(found, layer) for layer in chosen}
    except SteerError as error:
        raise error.at("/layers") from None
    if progress is not None:
        progress(1)
    source = None if lens is None else f"{lens.card.name or 'lens'}@{lens.sha256[:12]}"
    return ControlVector.of(
        rows,
        name=name,
        model=engine.info.own_name,
        site=site,
        default_layers=(chosen[len(chosen) // 2],) if layers is None else None,
        description=description,
        licence=licence,
        provenance={
            "method": "token",
            "token": number,
            "text": token_texts(engine.tokenizer, [number])[0],
            "lens": source,
            **made_on(engine),
        },
    )
