"""`steer inspect concepts`: roles and fillers that states hold, by a vector-symbolic probe."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from steer.cli.inspecting import (
    JsonOption,
    LayerOption,
    PngOption,
    bench_for,
    layers_of,
    place_of,
    result_of,
    show,
)
from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, RegistryOption
from steer.cli.options import checked
from steer.cli.reporting import out, table_out
from steer.errors import FileFormatError


def concepts(
    examples: Annotated[
        Path | None,
        typer.Argument(
            help='JSON lines: {"text": …, "pairs": {ROLE: FILLER, …}}, or with messages or tokens.'
        ),
    ] = None,
    probe: Annotated[
        str | None,
        typer.Option(help="A registered probe, in the place of examples (steer fit concepts)."),
    ] = None,
    read: Annotated[
        list[str] | None,
        typer.Option("--read", "-r", help="A text to read with the probe; may be repeated."),
    ] = None,
    layers: LayerOption = None,
    at: Annotated[
        str | None,
        typer.Option(
            "--at",
            help="The position that is read, or a piece of each text; by default the last token, "
            "or the probe's own.",
        ),
    ] = None,
    clusters: Annotated[
        int | None, typer.Option(min=1, max=64, help="Clusters of a token's layers; by default 5.")
    ] = None,
    dimensions: Annotated[
        int | None,
        typer.Option(min=256, max=16_384, help="Channels of a code; by default 4096."),
    ] = None,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The cosine above which a filler counts.")
    ] = 0.1,
    held_out: Annotated[
        int | None,
        typer.Option(
            min=2, max=10, help="One in so many examples tries the probe; by default five."
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="Where the draws begin; by default 0.")
    ] = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read texts with a vector-symbolic probe: a registered one, or one taught on examples."""
    from steer import inspection

    texts = read or []
    fields: dict[str, Any] = {
        "prompts": [{"text": text} for text in texts],
        "threshold": threshold,
    }
    # A registered probe is told nothing of these, so only what was said is handed on.
    said = {
        "examples": None if examples is None else _examples(examples),
        "probe": probe,
        "position": None if at is None else place_of(at),
        "layers": None if layers is None else layers_of(layers),
        "clusters": clusters,
        "dimensions": dimensions,
        "held_out": held_out,
        "seed": seed,
    }
    fields |= {name: value for name, value in said.items() if value is not None}
    checked(inspection.ConceptsRequest, fields)
    with bench_for(model, registry, device, dtype) as bench:
        result = result_of(bench, inspection.CONCEPTS, fields)
    show(result, inspection.CONCEPTS, png, as_json)
    if not as_json:
        _show_accuracy(result)


def _examples(path: Path) -> list[dict[str, Any]]:
    from steer.fit.data.jsonl import LineReader

    def example(value: Any, at: str) -> dict[str, Any]:
        if not isinstance(value, dict) or not isinstance(value.get("pairs"), dict):
            raise FileFormatError(
                f"{at}: an example is an object with 'pairs', an object of fillers by role, beside "
                "one of 'text', 'messages' and 'tokens'",
                code="invalid_examples",
            )
        return value

    shape = '{"text": …, "pairs": {ROLE: FILLER}}'
    return list(LineReader(path, "example", shape, "invalid_examples").read(example).items)


def _show_accuracy(result: Any) -> None:
    from rich.table import Table
    from rich.text import Text

    if result.held_out is None:
        return  # a probe of others', whose card does not say how it does
    table = Table(title=f"{result.held_out} held-out texts, {result.trained} taught")
    for name in ("role", "pairs", "right", "shuffled labels", "commonest filler", "unseen"):
        table.add_column(name, justify="left" if name == "role" else "right")
    for one in result.roles:
        shares = [
            "" if share is None else f"{share:.2f}"
            for share in (one.accuracy, one.shuffled, one.commonest)
        ]
        table.add_row(Text(one.role), str(one.pairs), *shares, str(one.unseen))
    table_out().print(table)
    out().print(
        f"of {result.fillers} random codes the likest has a cosine of about {result.random:.2f}",
        highlight=False,
    )
