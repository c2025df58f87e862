"""`steer inspect trace`: which states carry what a subject tells the model."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.inspecting import (
    AtOption,
    JsonOption,
    LayerOption,
    PlainOption,
    PngOption,
    PromptArgument,
    bench_for,
    layers_of,
    place_of,
    prompt_fields,
    result_of,
    show,
    token_of,
)
from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, RegistryOption
from steer.cli.reporting import out

if TYPE_CHECKING:
    from steer.inspection import TraceResult


def trace(
    prompt: PromptArgument,
    subject: Annotated[str, typer.Option(help="The piece of the prompt to drown in noise.")],
    plain: PlainOption = False,
    token: Annotated[
        str | None,
        typer.Option(help="The answer: a text with its space, or #id; by default what is said."),
    ] = None,
    layers: LayerOption = None,
    at: AtOption = None,
    site: Annotated[
        str, typer.Option(help="What is put back: resid_post, attn_out or mlp_out.")
    ] = "resid_post",
    window: Annotated[
        int, typer.Option(min=1, max=64, help="How many layers are put back at a time.")
    ] = 1,
    noise: Annotated[float, typer.Option(help="In deviations of the embeddings.")] = 3.0,
    draws: Annotated[int, typer.Option(min=1, max=64, help="How often noise is drawn.")] = 3,
    seed: Annotated[int, typer.Option(min=0, help="Where the draws begin.")] = 0,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Drown a subject in noise and put one clean state back at a time."""
    from steer import inspection

    fields: dict[str, Any] = {
        "subject": subject,
        "layers": layers_of(layers),
        "positions": [place_of(one) for one in at] if at else "all",
        "site": site,
        "window": window,
        "noise": noise,
        "draws": draws,
        "seed": seed,
    }
    if token:
        fields["token"] = token_of(token)
    with bench_for(model, registry, device, dtype) as bench:
        fields |= prompt_fields(bench, prompt, plain)
        result = result_of(bench, inspection.TRACE, fields)
    show(result, inspection.TRACE, png, as_json)
    assert isinstance(result, inspection.TraceResult)
    if not as_json:
        out().print(_summary(result), highlight=False)


def _summary(result: TraceResult) -> str:
    """The three probabilities that the table is read between."""
    text = (
        f"{result.clean.token!r}: {result.clean.probability:.3f} clean, "
        f"{result.corrupted.probability:.3f} with noise at the subject"
    )
    if result.elsewhere is not None:
        places = ", ".join(map(str, result.elsewhere.positions))
        text += f"; {result.elsewhere.probability:.3f} with it at token {places} instead"
    return text if result.known else text + "; the model would not say it first"
