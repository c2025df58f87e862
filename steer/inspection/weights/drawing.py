"""Weights as a heat map: tokens in the order of their scores, or heads by how far they copy."""

from __future__ import annotations

from collections.abc import Sequence

from steer.inspection.heatmap import HeatMap
from steer.inspection.weights.result import ScoredPair, ScoredToken, TokenReading, WeightsResult

Scored = ScoredToken | ScoredPair


def weights_heat_map(result: WeightsResult) -> HeatMap:
    """Of a neuron, a vector or a head the strongest tokens or pairs; of many heads a table."""
    if result.most is None and not result.readings:
        return _table(result)
    groups: list[tuple[str, str, Sequence[Scored], Sequence[Scored]]] = []
    if result.most is not None and result.least is not None:
        groups.append(("least pairs", "most pairs", result.least, result.most))
    for one in reversed(result.readings):
        groups.append((f"{_name(one)}, least", f"{_name(one)}, most", one.least, one.most))
    rows: list[tuple[str, Sequence[Scored], float]] = []
    for first, second, least, most in groups:
        # What a neuron reads and what it writes are in units of their own: each has its scale.
        largest = max((abs(one.score) for one in (*least, *most)), default=0.0) or 1.0
        rows += [(first, least, largest), (second, most, largest)]
    width = max(len(entries) for _, entries, _ in rows)
    return HeatMap(
        title=result.part[:1].upper() + result.part[1:],
        subtitle=f"{result.model} · {_summary(result)}",
        row_label="",
        column_label="rank",
        rows=[name for name, _, _ in rows],
        columns=[str(n + 1) for n in range(width)],
        values=[
            [one.score / largest for one in entries] + [0.0] * (width - len(entries))
            for _, entries, largest in rows
        ],
        texts=[
            [_text(one) for one in entries] + [""] * (width - len(entries))
            for _, entries, _ in rows
        ],
        scale="share of the greatest",
        limits=(-1.0, 1.0),
        diverging=True,
    )


def _table(result: WeightsResult) -> HeatMap:
    layers = sorted({one.layer for one in result.heads})
    values = [[one.copying for one in result.heads if one.layer == layer] for layer in layers]
    most = max(abs(value) for row in values for value in row) or 1.0
    return HeatMap(
        title="How far heads copy",
        subtitle=f"{result.model} · a token's score by attending to itself, in deviations of all",
        row_label="layer",
        column_label="head",
        rows=[str(layer) for layer in layers],
        columns=[str(n) for n in range(len(values[0]))],
        values=values,
        texts=[[f"{value:+.2f}" for value in row] for row in values],
        scale="copying",
        limits=(-most, most),
        diverging=True,
    )


def _summary(result: WeightsResult) -> str:
    said = []
    if result.heads:
        said.append(f"copying {result.heads[0].copying:+.2f}")
    said += [
        f"{one.what} {one.standing:.1f} deviations"
        for one in result.readings[:2]
        if one.input is None
    ]
    if result.by_chance is not None:
        said.append(f"{result.by_chance:.1f} by chance")
    return " · ".join(said)


def _name(reading: TokenReading) -> str:
    if reading.input is not None:
        return f"{reading.input.token!r}"
    return f"{reading.layer} {reading.what}"


def _text(one: Scored) -> str:
    return one.token if isinstance(one, ScoredToken) else f"{one.input.token}→{one.output.token}"
