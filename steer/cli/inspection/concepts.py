"""`steer inspect concepts`: roles and fillers that states hold, by a vector-symbolic probe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.inspecting import JsonOption, LayerOption, PngOption, layers_of, place_of, show
from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, running_engine
from steer.cli.options import checked
from steer.cli.reporting import out, table_out
from steer.errors import FileFormatError

if TYPE_CHECKING:
    from steer.inspection import ConceptsResult


def concepts(
    examples: Annotated[
        Path,
        typer.Argument(
            help='JSON lines: {"text": …, "pairs": {ROLE: FILLER, …}}, or with messages or tokens.'
        ),
    ],
    read: Annotated[
        list[str] | None,
        typer.Option("--read", "-r", help="A text to read with the probe; may be repeated."),
    ] = None,
    layers: LayerOption = None,
    at: Annotated[
        str, typer.Option("--at", help="The position that is read, or a piece of each text.")
    ] = "-1",
    clusters: Annotated[int, typer.Option(min=1, max=64, help="Clusters of a token's layers.")] = 5,
    dimensions: Annotated[
        int, typer.Option(min=256, max=16_384, help="Channels of a code.")
    ] = 4096,
    threshold: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="The cosine above which a filler counts.")
    ] = 0.1,
    held_out: Annotated[
        int, typer.Option(min=2, max=10, help="One in so many examples tries the probe.")
    ] = 5,
    seed: Annotated[int, typer.Option(min=0, help="Where the draws begin.")] = 0,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Teach a vector-symbolic probe, try it on held-out texts and read texts with it."""
    from steer import inspection

    texts = read or []
    fields: dict[str, Any] = {
        "examples": _examples(examples),
        "prompts": [{"text": text} for text in texts],
        "position": place_of(at),
        "clusters": clusters,
        "dimensions": dimensions,
        "threshold": threshold,
        "held_out": held_out,
        "seed": seed,
    }
    if layers is not None:
        fields["layers"] = layers_of(layers)
    request = checked(inspection.ConceptsRequest, fields)
    with running_engine(model, device=device, dtype=dtype) as engine:
        result = inspection.concepts(engine, request)
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


def _show_accuracy(result: ConceptsResult) -> None:
    from rich.table import Table
    from rich.text import Text

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
