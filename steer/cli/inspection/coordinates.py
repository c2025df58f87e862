"""`steer inspect coordinates`: where prompts' states lie in the space of a few vectors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.inspecting import (
    JsonOption,
    PlainOption,
    PngOption,
    SiteOption,
    SpecOption,
    bench_for,
    place_of,
    prompt_fields,
    result_of,
    show,
    steering_fields,
)
from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, RegistryOption
from steer.cli.reporting import out, table_out

if TYPE_CHECKING:
    from steer.inspection import CoordinatesResult


def coordinates(
    prompts: Annotated[list[str], typer.Argument(help="What is said to the model, one or more.")],
    vector: Annotated[list[str], typer.Option("--vector", "-v", help="A vector; may be repeated.")],
    layer: Annotated[int, typer.Option(min=0, help="The layer that is read.")],
    plain: PlainOption = False,
    at: Annotated[
        str, typer.Option("--at", help="The position that is read, or a piece of each prompt.")
    ] = "-1",
    origin: Annotated[
        str, typer.Option(help="Counted from the mean of the prompts' states, or from zero.")
    ] = "mean",
    site: SiteOption = "resid_post",
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read prompts as points in the plane, or the space, of registered vectors."""
    from steer import inspection

    fields: dict[str, Any] = {
        "vectors": vector,
        "layer": layer,
        "position": place_of(at),
        "origin": origin,
        "site": site,
        **steering_fields(spec),
    }
    with bench_for(model, registry, device, dtype) as bench:
        fields["prompts"] = [prompt_fields(bench, prompt, plain) for prompt in prompts]
        result = result_of(bench, inspection.COORDINATES, fields)
    assert isinstance(result, inspection.CoordinatesResult)
    if not as_json:
        _show_points(result, prompts)
    show(result, inspection.COORDINATES, png, as_json)


def _show_points(result: CoordinatesResult, prompts: list[str]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Coordinates at layer {result.layer}")
    table.add_column("")
    table.add_column("prompt", overflow="fold")
    for name in (*result.vectors, "explained"):
        table.add_column(Text(name), justify="right")
    for n, (one, prompt) in enumerate(zip(result.points, prompts, strict=True)):
        numbers = [f"{number:+.2f}" for number in one.coordinates]
        table.add_row(str(n), Text(prompt), *numbers, f"{one.explained:.2f}")
    table_out().print(table)
    out().print(
        f"together {result.explained:.2f} explained, {result.by_chance:.2f} by chance",
        highlight=False,
    )
