"""Which vectors states point along: the answer, and its picture."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Finite
from steer.inspection.token_labels import token_label
from steer.spec import Site

_SOUND = 0.05


class VectorMatch(BaseModel):
    """One vector at one layer and position.

    `cosine` and `projection` are with the state as it is. `match` is the cosine with the state less
    the mean of the background's, `standing` that in deviations of random directions, and `p` the
    share of those that point along the state, or against it, as far.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    vector: str
    layer: int
    position: int
    cosine: Finite
    projection: Finite
    match: Finite
    standing: Finite
    p: Finite


class MatchResult(BaseModel):
    """`matches` of each layer and position, the strongest first.

    `vectors` are those that were read, `left_out` those of the model that belong to another site or
    to layers that were not read. `background` counts the tokens of other texts.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.match"] = "inspect.match"
    model: str
    site: Site
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    vectors: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    background: int
    draws: int
    matches: tuple[VectorMatch, ...]
    fingerprint: str | None = None


def match_heat_map(result: MatchResult) -> HeatMap:
    """Vectors × layers and positions, in deviations; framed where so many vectors would hardly give
    one by chance. The vector that stands out most is at the top."""
    columns = [(layer, place) for layer in result.layers for place in result.positions]
    found = {(one.vector, one.layer, one.position): one for one in result.matches}
    strongest = dict.fromkeys(result.vectors, 0.0)
    for one in result.matches:
        strongest[one.vector] = max(strongest[one.vector], abs(one.standing))
    names = sorted(result.vectors, key=lambda name: (strongest[name], name))
    values, texts, marked = [], [], set()
    for row, name in enumerate(names):
        cells = [found.get((name, layer, place)) for layer, place in columns]
        values.append([0.0 if one is None else one.standing for one in cells])
        texts.append(["" if one is None else f"{one.standing:+.1f}" for one in cells])
        marked |= {
            (row, column)
            for column, one in enumerate(cells)
            if one is not None and one.p * len(names) <= _SOUND
        }
    most = max(abs(value) for row in values for value in row) or 1.0
    single = len(result.positions) == 1
    where = repr(result.tokens[result.positions[0]]) if single else "some tokens"
    return HeatMap(
        title="Vectors that states match",
        subtitle=f"{result.model} · {result.site} at {where} · deviations of random directions",
        row_label="",
        column_label="layer" if single else "layer and token",
        rows=names,
        columns=[
            str(layer) if single else f"{layer}\n{token_label(result.tokens[place])}\n{place}"
            for layer, place in columns
        ],
        values=values,
        texts=texts,
        scale="deviations",
        limits=(-most, most),
        diverging=True,
        marked=frozenset(marked),
    )
