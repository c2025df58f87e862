"""An attribution as a heat map: layers up, parts across, the embedding below the first layer."""

from __future__ import annotations

from steer.inspection.attribution.result import AttributionResult
from steer.inspection.heatmap import HeatMap


def attribution_heat_map(result: AttributionResult) -> HeatMap:
    """What attention and MLP of each layer give, and the heads where the answer has them."""
    heads = max(len(one.heads or ()) for one in result.layers)
    width = 2 + heads
    values = [[result.embedding] + [0.0] * (width - 1)]
    texts = [[_number(result.embedding)] + [""] * (width - 1)]
    for one in result.layers:
        row = [one.attention, one.mlp, *(one.heads or ())]
        values.append(row)
        texts.append([_number(share) for share in row])
    most = max(abs(share) for row in values for share in row) or 1.0
    return HeatMap(
        title=f"Logit of {_named(result)}",
        subtitle=f"{result.model} · after {result.tokens[result.position]!r} · "
        f"{result.logit:.2f}, of it {_number(result.constant)} constant",
        row_label="layer",
        column_label="part",
        rows=["embed", *(str(one.layer) for one in result.layers)],
        columns=["attn", "MLP", *(f"head {n}" for n in range(heads))],
        values=values,
        texts=texts,
        scale="share of the logit",
        limits=(-most, most),
        diverging=True,
    )


def _number(share: float) -> str:
    text = f"{share:+.2f}"
    return "0.00" if float(text) == 0 else text


def _named(result: AttributionResult) -> str:
    if result.against is None:
        return repr(result.token.token)
    return f"{result.token.token!r} − {result.against.token!r}"
