"""`steer capture`: the states of a whole data set, on disk."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, running_engine
from steer.cli.options import checked, parse_selection
from steer.cli.reporting import out, progress_bar
from steer.errors import SteerError
from steer.model import HookPoint, parse_layers
from steer.spec import Site, Where


def capture(
    texts: Annotated[
        Path, typer.Argument(help="JSON lines: texts, messages, or objects with messages.")
    ],
    folder: Annotated[Path, typer.Argument(help="The folder to write, or to go on with.")],
    layers: Annotated[str, typer.Option(help="Such as 14 or 2-5.")],
    model: ModelOption = DEMO_MODEL,
    site: Annotated[Site, typer.Option(help="Where in each block.")] = "resid_post",
    chat: Annotated[
        bool, typer.Option("--chat", help="As a user's message, in the model's chat template.")
    ] = False,
    answer_tokens: Annotated[
        int,
        typer.Option(min=0, help="Let the model answer with up to so many tokens, read as well."),
    ] = 0,
    context: Annotated[
        int | None, typer.Option(min=2, help="Cut texts into pieces of so many tokens.")
    ] = None,
    skip: Annotated[int, typer.Option(min=0, help="First tokens that are left out.")] = 0,
    stride: Annotated[int, typer.Option(min=1, help="Every so many tokens one is kept.")] = 1,
    pooled: Annotated[
        Literal["none", "last", "mean", "max"],
        typer.Option(help="Make one row of a text."),
    ] = "none",
    where: Annotated[
        str | None,
        typer.Option(
            help="Only the tokens that this selects: JSON as a spec has it, such as "
            '\'{"roles": ["assistant"]}\', or generation, last, onward.'
        ),
    ] = None,
    stored: Annotated[
        Literal["float32", "float16", "bfloat16"], typer.Option(help="The type of the file.")
    ] = "float32",
    batch: Annotated[int, typer.Option(min=1, help="Texts read at once.")] = 16,
    seed: Annotated[int, typer.Option(min=0, help="Draws the answers.")] = 0,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read texts through the model, and keep its states in safetensors files with token ids."""
    from steer.fit.bulk.capturing import BulkReading, capture_to
    from steer.fit.bulk.selected import pieces, selected_tokens
    from steer.fit.data.pairs import read_prompts
    from steer.prompts import Marked, as_chat

    chosen = None if where is None else checked(Where, parse_selection(where))
    points = tuple(HookPoint(layer, site) for layer in parse_layers(layers))
    prompts = read_prompts(texts)
    if context is not None and answer_tokens:
        raise SteerError(
            "a piece of a text is not answered: give --context or --answer-tokens, not both",
            code="invalid_option",
        )
    reading = BulkReading(
        points,
        pooled=pooled,
        stride=stride,
        skip=skip,
        answer_tokens=answer_tokens,
        seed=seed,
        batch=batch,
        dtype=stored,
    )
    with running_engine(model, device=device, dtype=dtype) as engine:
        asked = [
            as_chat(engine.tokenizer, one) if chat and not isinstance(one, Marked) else one
            for one in prompts
        ]
        cut, _ = pieces(engine, asked, context)
        selected = None
        if chosen is not None:
            selected = selected_tokens(
                engine, asked, chosen, context, answered=answer_tokens > 0, at="/where"
            )
        with progress_bar("texts", len(cut)) as done:
            card = capture_to(engine, cut, folder, reading, selected=selected, progress=done)
    out().print(
        f"wrote {folder}: {card.rows} rows of {card.texts} texts in {len(card.shards)} files",
        highlight=False,
    )
