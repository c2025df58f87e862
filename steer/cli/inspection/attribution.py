"""`steer inspect attribution`: what each part of the model gives to a token's logit."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.inspecting import (
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
    from steer.inspection import AttributionResult


def attribution(
    prompt: PromptArgument,
    plain: PlainOption = False,
    token: Annotated[
        str | None,
        typer.Option(help="The token: a text with its space, or #id; by default what is said."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Another token: what speaks for the one and not for it.")
    ] = None,
    at: Annotated[
        str, typer.Option("--at", help="The position that it follows, or a piece of the prompt.")
    ] = "-1",
    heads: Annotated[bool, typer.Option("--heads", help="Take attention apart.")] = False,
    neurons: Annotated[
        int, typer.Option(min=0, max=1000, help="How many of the strongest MLP neurons to name.")
    ] = 0,
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Take a token's logit apart: what each attention, MLP, head and neuron gives to it."""
    from steer import inspection

    fields: dict[str, Any] = {"heads": heads, "neurons": neurons, "position": place_of(at)}
    fields |= {
        name: token_of(text) for name, text in (("token", token), ("against", against)) if text
    }
    fields |= steering_fields(spec)
    with bench_for(model, registry, device, dtype) as bench:
        fields |= prompt_fields(bench, prompt, plain)
        result = result_of(bench, inspection.ATTRIBUTION, fields)
    show(result, inspection.ATTRIBUTION, png, as_json)
    assert isinstance(result, inspection.AttributionResult)
    if not as_json:
        _show_neurons(result)
        out().print(
            f"logit {result.logit:.4f} = {result.constant:.4f} constant + {result.embedding:.4f} "
            f"embedding + layers; {result.unexplained:.1e} unexplained",
            highlight=False,
        )


def _show_neurons(result: AttributionResult) -> None:
    """The neurons that give most."""
    from rich.table import Table

    if not result.neurons:
        return
    table = Table(title="MLP neurons that give most")
    for name in ("layer", "neuron", "activation", "share"):
        table.add_column(name, justify="right")
    for one in result.neurons:
        table.add_row(str(one.layer), str(one.neuron), f"{one.activation:.3f}", f"{one.share:+.3f}")
    table_out().print(table)
