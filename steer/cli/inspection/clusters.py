"""`steer inspect clusters`: clusters of the states of a file's texts."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from steer.cli.inspecting import (
    AtOption,
    JsonOption,
    PngOption,
    SiteOption,
    place_of,
    show,
)
from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    kept_states,
    running_engine,
)
from steer.cli.options import checked
from steer.cli.reporting import out, table_out
from steer.errors import FileFormatError

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.inspection import ClustersResult
    from steer.prompts import Prompt


def clusters(
    texts: Annotated[
        Path,
        typer.Argument(
            help='JSON lines: the lines of any fit; with {"text": …, "label": …} also purity.'
        ),
    ],
    layer: Annotated[int, typer.Option(min=0, help="The layer that is read.")],
    at: AtOption = None,
    count: Annotated[
        int | None,
        typer.Option(
            "--clusters", min=1, max=256, help="How many; by default those that part best, 2 to 16."
        ),
    ] = None,
    linkage: Annotated[
        str, typer.Option(help="What is joined: ward, average or complete.")
    ] = "ward",
    exemplars: Annotated[int, typer.Option(min=1, max=32, help="Texts told of each.")] = 3,
    site: SiteOption = "resid_post",
    states: Annotated[
        Path | None,
        typer.Option(help="Read the states that steer capture kept in this folder."),
    ] = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Cluster the states of many texts, and tell each cluster by its nearest texts."""
    from steer import inspection

    fields: dict[str, Any] = {
        "layer": layer,
        "site": site,
        "positions": [place_of(one) for one in at] if at else [-1],
        "clusters": count,
        "linkage": linkage,
        "exemplars": exemplars,
    }
    with ExitStack() as stack:
        engine: Engine
        if states is not None:
            engine = kept_states(states, model)
        else:
            engine = stack.enter_context(running_engine(model, device=device, dtype=dtype))
        fields["prompts"] = _prompts(engine, texts)
        request = checked(inspection.ClustersRequest, fields)
        result = inspection.clusters(engine, request)
    if not as_json:
        _show_clusters(result)
    show(result, inspection.CLUSTERS, png, as_json)


def _prompts(engine: Engine, path: Path) -> list[dict[str, Any]]:
    """The file's texts as tokens, as fits and captures read them; with labels where each line has
    one."""
    from steer.fit.data.labels import read_labelled
    from steer.fit.data.texts import read_texts, token_ids
    from steer.prompts.rendering import render

    tokenizer = engine.tokenizer
    try:
        items = read_labelled(path).items
    except FileFormatError:
        texts = read_texts(path).texts
        return [
            {"tokens": token_ids(one) or render(tokenizer, cast("Prompt", one))} for one in texts
        ]
    return [{"tokens": render(tokenizer, one.prompt), "label": one.label} for one in items]


def _show_clusters(result: ClustersResult) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"Clusters at layer {result.layer}", show_lines=True)
    for name in ("", "states", "likeness", "nearest its middle"):
        table.add_column(name, overflow="fold", justify="left" if "near" in name else "right")
    for one in result.clusters:
        texts = "\n".join(
            f"{exemplar.text.strip()!r}" + (f"  {exemplar.label}" if exemplar.label else "")
            for exemplar in one.exemplars
        )
        table.add_row(str(one.number), str(one.size), f"{one.similarity:.2f}", Text(texts))
    table_out().print(table)
    if result.purity is not None:
        out().print(
            f"purity {result.purity:.2f}, {result.purity_by_chance:.2f} with shuffled labels",
            highlight=False,
        )
