"""`steer inspect weights`: what is written in the weights, as tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit.saving import write_file
from steer.cli.inspecting import (
    JsonOption,
    PngOption,
    bench_for,
    result_of,
    show,
    token_of,
)
from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, RegistryOption
from steer.cli.reporting import out, table_out

if TYPE_CHECKING:
    from steer.inspection import WeightsResult


def weights(
    layer: Annotated[int | None, typer.Option(min=0, help="The layer.")] = None,
    neuron: Annotated[int | None, typer.Option(min=0, help="A neuron of the MLP.")] = None,
    head: Annotated[int | None, typer.Option(min=0, help="A head of the attention.")] = None,
    vector: Annotated[
        str | None, typer.Option("--vector", "-v", help="Or a registered vector.")
    ] = None,
    looks: Annotated[
        bool, typer.Option("--qk", help="Which token a head attends to from which.")
    ] = False,
    tokens: Annotated[
        list[str] | None,
        typer.Option(
            "--token",
            help="What the head writes where it attends to this token, or with --qk what it looks "
            "for from it: a text with its space, or #id. May be repeated.",
        ),
    ] = None,
    top: Annotated[int, typer.Option(min=1, max=100, help="Tokens or pairs to report.")] = 10,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read a neuron, a head or a vector as tokens; without one, how far each head copies."""
    from steer import inspection

    fields: dict[str, Any] = {
        "layer": layer,
        "neuron": neuron,
        "head": head,
        "vector": vector,
        "circuit": "qk" if looks else "ov",
        "inputs": [token_of(one) for one in tokens or ()],
        "top": top,
    }
    with bench_for(model, registry, device, dtype) as bench:
        result = result_of(bench, inspection.WEIGHTS, fields)
    assert isinstance(result, inspection.WeightsResult)
    if as_json or not (result.readings or result.most):
        show(result, inspection.WEIGHTS, png, as_json)
        return
    _show_tokens(result)
    if png is not None:
        write_file(png, inspection.weights_heat_map(result).png())
        out().print(f"wrote {png}", highlight=False)


def _show_tokens(result: WeightsResult) -> None:
    """A row for each end of each reading, the strongest first, and the head's pairs."""
    from rich.table import Table
    from rich.text import Text

    rows: list[tuple[str, str, list[str]]] = []
    for reading in result.readings:
        name = f"layer {reading.layer} {reading.what}"
        name = name if reading.input is None else f"{name} of {reading.input.token!r}"
        for end, tokens in (("most", reading.most), ("least", reading.least)):
            rows.append((name, end, [f"{t.token!r} {t.score:+.3g}" for t in tokens]))
    for end, pairs in (("most", result.most), ("least", result.least)):
        entries = [f"{p.input.token!r}→{p.output.token!r} {p.score:+.3g}" for p in pairs or ()]
        rows += [("pairs", end, entries)] if entries else []
    table = Table(title=result.part[:1].upper() + result.part[1:], show_lines=True)
    for column in ("", "", "tokens and scores"):
        table.add_column(column, overflow="fold")
    for name, end, entries in rows:
        table.add_row(Text(name), end, Text(",  ".join(entries)))
    table_out().print(table)
    for one in result.heads:
        out().print(
            f"copying {one.copying:+.2f}: by attending to itself a token scores {one.own:+.3g}, "
            f"any pair {one.mean:+.3g} ± {one.deviation:.3g}",
            highlight=False,
        )
        if one.strongest is not None and one.strongest_by_chance is not None:
            out().print(
                f"the strongest pair stands {one.strongest:.1f} deviations out; "
                f"{one.strongest_by_chance:.1f} with keys turned at random",
                highlight=False,
            )
    if result.by_chance is not None:
        stands = ", ".join(f"{reading.standing:.1f}" for reading in result.readings)
        out().print(
            f"the strongest tokens stand {stands} deviations out; {result.by_chance:.1f} by chance",
            highlight=False,
        )
