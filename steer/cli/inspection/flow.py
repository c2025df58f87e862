"""`steer inspect flow`: what heads carry from token to token."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.inspecting import (
    AtOption,
    JsonOption,
    PlainOption,
    PngOption,
    PromptArgument,
    SpecOption,
    bench_for,
    place_of,
    prompt_fields,
    result_of,
    show,
    steering_fields,
    token_of,
)
from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, RegistryOption
from steer.cli.reporting import out, table_out

if TYPE_CHECKING:
    from steer.inspection import FlowResult


def flow(
    prompt: PromptArgument,
    plain: PlainOption = False,
    at: AtOption = None,
    token: Annotated[
        str | None,
        typer.Option(help="The token: a text with its space, or #id; by default what is said."),
    ] = None,
    edges: Annotated[
        int, typer.Option(min=1, max=512, help="How many of the strongest edges to report.")
    ] = 12,
    top: Annotated[int, typer.Option(min=1, max=50, help="Tokens of each edge.")] = 4,
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Follow what heads bring from which tokens, and what the next token owes to it."""
    from steer import inspection

    fields: dict[str, Any] = {
        "positions": [place_of(one) for one in at] if at else [-1],
        "edges": edges,
        "top": top,
        **steering_fields(spec),
    }
    if token:
        fields["token"] = token_of(token)
    with bench_for(model, registry, device, dtype) as bench:
        fields |= prompt_fields(bench, prompt, plain)
        result = result_of(bench, inspection.FLOW, fields)
    assert isinstance(result, inspection.FlowResult)
    if not as_json:
        _show_edges(result)
    show(result, inspection.FLOW, png, as_json)


def _show_edges(result: FlowResult) -> None:
    """A table for each position: its edges, the strongest first, and what they come to."""
    from rich.table import Table
    from rich.text import Text

    for one in result.followed:
        here = [edge for edge in result.edges if edge.position == one.position]
        table = Table(title=f"What flows into {one.token.token!r} at token {one.position}")
        for name in ("layer", "head", "reads", "with", "gives"):
            table.add_column(name, justify="left" if name == "reads" else "right")
        table.add_column("raises", overflow="fold")
        for edge in here:
            colour = "green" if edge.share > 0 else "red"
            table.add_row(
                str(edge.layer),
                str(edge.head),
                Text(f"{result.tokens[edge.reads]!r} {edge.reads}"),
                f"{edge.weight:.2f}",
                Text(f"{edge.share:+.2f}", style=colour),
                Text(" ".join(repr(token.token) for token in edge.writes)),
            )
        table_out().print(table)
        kept, attention = sum(edge.share for edge in here), sum(x.attention for x in one.layers)
        other = sum(x.mlp + x.rest for x in one.layers)
        out().print(
            f"logit {one.logit:.2f} = {one.constant:.2f} constant {one.embedding:+.2f} embedding "
            f"{attention:+.2f} attention (these edges {kept:+.2f}) {other:+.2f} MLPs and rest",
            highlight=False,
        )
