"""`steer inspect`: read what a model's hidden states say.

Here is what all its commands share, and those that read states; the others lie in
`steer.cli.inspection`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.fit.saving import write_file
from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
    open_registry,
    plans,
    running_engine,
)
from steer.cli.options import checked, parse_selection
from steer.cli.reporting import out, table_out
from steer.cli.steering import read_spec
from steer.errors import SteerError
from steer.model import SomeLayersOrAll, parse_layer_choice

if TYPE_CHECKING:
    from pydantic import BaseModel

    from steer.engines.transformers.engine import TransformersEngine
    from steer.inspection.heatmap import HeatMap
    from steer.inspection.method import Inspection, Picture
    from steer.inspection.patchscopes.result import TargetSays
    from steer.plan.cache import PlanCache
    from steer.registry.registry import Registry

app = typer.Typer(help="Read what the model's hidden states say.", no_args_is_help=True)

PromptArgument = Annotated[str, typer.Argument(help="What is said to the model.")]
PlainOption = Annotated[
    bool, typer.Option("--plain", help="Read the text as it is, without chat template.")
]
LayerOption = Annotated[
    str | None, typer.Option("--layers", help="Such as 2-5 or 1,3; by default all.")
]
AtOption = Annotated[
    list[str] | None,
    typer.Option(
        "--at",
        help="A position (negative from the end), or a piece of the prompt: then its last token. "
        "May be repeated.",
    ),
]
WhereOption = Annotated[
    str | None,
    typer.Option(
        "--where",
        help="Or the tokens that this selects: JSON as a spec has it, such as "
        '\'{"roles": ["user"]}\'.',
    ),
]
SiteOption = Annotated[str, typer.Option(help="Where in each block the states are read.")]
SpecOption = Annotated[
    Path | None, typer.Option("--spec", help="Read under this steering: a JSON file.")
]
PngOption = Annotated[Path | None, typer.Option("--png", help="Write a heat map here.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]
TopOption = Annotated[int, typer.Option(min=1, max=100, help="Tokens to report at each place.")]


@dataclass(frozen=True)
class Bench:
    """What an inspection needs."""

    engine: TransformersEngine
    library: Registry
    plans: PlanCache


@app.command("logit-lens")
def logit_lens(
    prompt: PromptArgument,
    plain: PlainOption = False,
    layers: LayerOption = None,
    at: AtOption = None,
    where: WhereOption = None,
    site: SiteOption = "resid_post",
    top: TopOption = 5,
    lens: Annotated[
        str | None, typer.Option(help="A registered lens to read through, tuned or Jacobian.")
    ] = None,
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read every layer by the final norm and the output matrix, or through a lens."""
    from steer import inspection

    fields: dict[str, Any] = {"layers": layers_of(layers), "site": site, "top": top, "lens": lens}
    fields |= steering_fields(spec)
    with bench_for(model, registry, device, dtype) as bench:
        fields |= {**prompt_fields(bench, prompt, plain), "positions": _positions(at, where, "all")}
        result = result_of(bench, inspection.LOGIT_LENS, fields)
    show(result, inspection.LOGIT_LENS, png, as_json)


@app.command("patchscope")
def patchscope(
    prompt: PromptArgument,
    plain: PlainOption = False,
    preset: Annotated[
        str, typer.Option(help="The target prompt: identity or attribute.")
    ] = "identity",
    target: Annotated[
        str | None, typer.Option(help="A target prompt of your own, as plain text.")
    ] = None,
    target_at: Annotated[
        int, typer.Option(help="The position in it where the state goes, negative from the end.")
    ] = -1,
    target_layers: Annotated[
        str | None, typer.Option(help="Layers to patch; by default the one that was read.")
    ] = None,
    layers: LayerOption = None,
    at: AtOption = None,
    where: WhereOption = None,
    site: SiteOption = "resid_post",
    top: TopOption = 5,
    max_tokens: Annotated[int, typer.Option(min=0, max=256, help="Tokens to generate.")] = 12,
    controls: Annotated[
        bool,
        typer.Option(help="Run beside: the text instead of a state, and other tokens' states."),
    ] = True,
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Let the model itself read a hidden state, in another prompt."""
    from steer import inspection

    fields: dict[str, Any] = {
        "layers": layers_of(layers),
        "site": site,
        "top": top,
        "max_tokens": max_tokens,
        "preset": preset if target is None else "custom",
        "controls": inspection.CONTROLS if controls else (),
        "positions": _positions(at, where, [-1]),
    }
    if target_layers is not None:
        fields["target_layers"] = layers_of(target_layers)
    if target is not None:
        fields["target"] = {"text": target, "position": target_at}
    with bench_for(model, registry, device, dtype) as bench:
        fields["source"] = {**prompt_fields(bench, prompt, plain), **steering_fields(spec)}
        result = result_of(bench, inspection.PATCHSCOPE, fields)
    show(result, inspection.PATCHSCOPE, png, as_json)
    if not as_json:
        _show_controls(result)


@app.command("activations")
def activations(
    prompt: PromptArgument,
    vector: Annotated[
        list[str], typer.Option("--vector", "-v", help="Read along this vector; may be repeated.")
    ],
    plain: PlainOption = False,
    layers: LayerOption = None,
    at: AtOption = None,
    where: WhereOption = None,
    site: SiteOption = "resid_post",
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Read the states along registered vectors: the cosine at each layer and token."""
    from steer import inspection

    fields = {"layers": layers_of(layers), "site": site, "vectors": vector, **steering_fields(spec)}
    with bench_for(model, registry, device, dtype) as bench:
        fields |= {**prompt_fields(bench, prompt, plain), "positions": _positions(at, where, "all")}
        result = result_of(bench, inspection.ACTIVATIONS, fields)
    show(result, inspection.ACTIVATIONS, png, as_json)


@app.command("ask")
def ask(
    prompt: PromptArgument,
    question: Annotated[
        list[str], typer.Option("--question", "-q", help="What is asked; may be repeated.")
    ],
    plain: PlainOption = False,
    oracle: Annotated[
        str | None,
        typer.Option(help="A registered oracle; without one the model is asked as it is."),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            help="How states are shown: activation_oracle, latent_qa or selfie; by default as the "
            "oracle was trained."
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help="Such as 2-5 or 1,3; by default those that the oracle's card names."),
    ] = None,
    at: AtOption = None,
    where: WhereOption = None,
    site: SiteOption = "resid_post",
    max_tokens: Annotated[int, typer.Option(min=1, max=256, help="Tokens to generate.")] = 24,
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Ask questions about hidden states, and see what is said without them."""
    from steer import inspection

    fields: dict[str, Any] = {
        "questions": question,
        "oracle": oracle,
        "form": form,
        "layers": None if layers is None else parse_layer_choice(layers),
        "site": site,
        "max_tokens": max_tokens,
        "positions": _positions(at, where, [-1]),
    }
    with bench_for(model, registry, device, dtype) as bench:
        fields["source"] = {**prompt_fields(bench, prompt, plain), **steering_fields(spec)}
        result = result_of(bench, inspection.ASK, fields)
    show(result, inspection.ASK, png, as_json)
    if not as_json:
        _show_without_states(result)


@contextmanager
def bench_for(
    model: str, registry: str | None, device: str | None, dtype: str | None
) -> Iterator[Bench]:
    with (
        open_registry(registry, model) as library,
        running_engine(model, device=device, dtype=dtype) as engine,
    ):
        yield Bench(engine, library, plans(engine, library))


def result_of(bench: Bench, method: Inspection, fields: dict[str, Any]) -> BaseModel:
    request = checked(method.request, fields)
    return method.run(bench.engine, request, plans=bench.plans, library=bench.library)


def show(result: BaseModel, method: Inspection, png: Path | None, as_json: bool) -> None:
    """JSON, a picture, or the heat map's texts as a table: layers down, positions across."""
    if as_json:
        typer.echo(result.model_dump_json(indent=2, exclude_none=True))
    from steer.inspection.heatmap import HeatMap

    heat: Picture | None = None if as_json and png is None else method.draw(result)
    if isinstance(heat, HeatMap) and not as_json:
        _show_table(heat)
    if heat is not None and png is not None:
        write_file(png, heat.png())
        if not as_json:
            out().print(f"wrote {png}", highlight=False)


def _show_table(heat: HeatMap) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{heat.title}: {heat.subtitle}", caption=f"{heat.scale} in colour")
    table.add_column(heat.row_label, justify="right")
    for column in heat.columns:
        table.add_column(Text(column), overflow="fold")
    for label, values, texts in reversed(
        list(zip(heat.rows, heat.values, heat.texts, strict=True))
    ):
        strong = max(abs(end) for end in heat.limits) / 2
        cells = [
            Text(repr(text)[1:-1], style="bold green" if abs(value) >= strong else "")
            for value, text in zip(values, texts, strict=True)
        ]
        table.add_row(label, *cells)
    table_out().print(table)


def _show_controls(result: BaseModel) -> None:
    """What the model says without the states that were read."""
    from rich.table import Table
    from rich.text import Text

    from steer.inspection import PatchscopeResult

    assert isinstance(result, PatchscopeResult)

    def said(one: TargetSays) -> Text:
        return Text(repr(one.top[0].token if one.text is None else one.text)[1:-1])

    table = Table(title="The same target prompt without the state")
    table.add_column("instead of the state")
    table.add_column("it says", overflow="fold")
    table.add_row("nothing, as it stands", said(result.baseline))
    for one in result.text_only:
        table.add_row(f"the text up to token {one.position}", said(one))
    for cell in result.cells:
        if cell.shuffled is not None and cell.layer == result.layers[-1]:
            what = (
                f"token {cell.shuffled.position}'s state, layers {cell.layer}→{cell.target_layer}"
            )
            table.add_row(what, said(cell.shuffled))
    table_out().print(table)


def _show_without_states(result: BaseModel) -> None:
    """Beside each answer what the same question gets without the state."""
    from rich.table import Table
    from rich.text import Text

    from steer.inspection import AskResult

    assert isinstance(result, AskResult)
    title = "The same questions without the state"
    caption = "* an answer that none of them gives"
    if not result.trained:
        caption += "; nothing was trained to read states here"
    table = Table(title=title, caption=caption)
    for name in ("layer", "question", "of the state", "of the text", "shuffled", "of nothing"):
        table.add_column(name, overflow="fold")
    for cell in result.cells:
        without = cell.controls
        said = [cell.text + (" *" if cell.from_state else "")]
        said += [one.text for one in (without.text, without.shuffled, without.none)]
        shown = [Text(repr(text)[1:-1]) for text in (result.questions[cell.question], *said)]
        table.add_row(str(cell.layer), *shown)
    table_out().print(table)


def prompt_fields(bench: Bench, prompt: str, plain: bool) -> dict[str, Any]:
    from steer.prompts import as_chat

    asked = prompt if plain else as_chat(bench.engine.tokenizer, prompt)
    return {"text" if isinstance(asked, str) else "messages": asked}


def steering_fields(spec: Path | None) -> dict[str, Any]:
    return {} if spec is None else {"steering": read_spec(spec)}


def layers_of(text: str | None) -> SomeLayersOrAll:
    """The layers that an option names; without one all."""
    return "all" if text is None else parse_layer_choice(text)


def _positions(at: list[str] | None, where: str | None, default: Any) -> Any:
    if where is None:
        return [place_of(one) for one in at] if at else default
    if at:
        raise SteerError(
            "--at and --where both say which tokens: give one of them", code="invalid_option"
        )
    return parse_selection(where)


def place_of(text: str) -> int | str:
    """A position, or a piece of the prompt."""
    try:
        return int(text)
    except ValueError:
        return text


def token_of(text: str) -> int | str:
    """A token as a text, or by its id, written #17."""
    number = text.removeprefix("#")
    return int(number) if number != text and number.isdecimal() else text
