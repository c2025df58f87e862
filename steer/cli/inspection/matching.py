"""`steer inspect match`: which registered vectors states point along."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.inspecting import (
    AtOption,
    JsonOption,
    LayerOption,
    PlainOption,
    PngOption,
    PromptArgument,
    SiteOption,
    SpecOption,
    bench_for,
    layers_of,
    place_of,
    prompt_fields,
    result_of,
    show,
    steering_fields,
)
from steer.cli.local import DEMO_MODEL, DeviceOption, DtypeOption, ModelOption, RegistryOption
from steer.cli.reporting import out

if TYPE_CHECKING:
    from steer.inspection import MatchResult


def match(
    prompt: PromptArgument,
    vector: Annotated[
        list[str] | None,
        typer.Option("--vector", "-v", help="A vector; may be repeated. By default all there are."),
    ] = None,
    plain: PlainOption = False,
    layers: LayerOption = None,
    at: AtOption = None,
    site: SiteOption = "resid_post",
    background: Annotated[
        Path | None,
        typer.Option(
            help="Texts, one a line, of which chance is told; by default some plain English ones.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    draws: Annotated[
        int, typer.Option(min=100, max=10_000, help="How many random directions are drawn.")
    ] = 4000,
    seed: Annotated[int, typer.Option(min=0, help="Where the draws begin.")] = 0,
    spec: SpecOption = None,
    png: PngOption = None,
    as_json: JsonOption = False,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Hold states against registered vectors, beside random directions that vary as states do."""
    from steer import inspection

    fields: dict[str, Any] = {
        "vectors": vector or "all",
        "layers": layers_of(layers),
        "positions": [place_of(one) for one in at] if at else [-1],
        "site": site,
        "draws": draws,
        "seed": seed,
    }
    if background is not None:
        lines = background.read_text(encoding="utf-8-sig").splitlines()
        fields["background"] = [line for line in lines if line.strip()]
    fields |= steering_fields(spec)
    with bench_for(model, registry, device, dtype) as bench:
        fields |= prompt_fields(bench, prompt, plain)
        result = result_of(bench, inspection.MATCH, fields)
    show(result, inspection.MATCH, png, as_json)
    assert isinstance(result, inspection.MatchResult)
    if not as_json:
        out().print(_summary(result), highlight=False)


def _summary(result: MatchResult) -> str:
    """The strongest match, and how many there would be by chance."""
    best = max(result.matches, key=lambda one: abs(one.standing))
    text = (
        f"{best.vector} at layer {best.layer}: {best.standing:+.1f} deviations, p {best.p:.2g} of "
        f"{result.draws} random directions like {result.background} states"
    )
    if result.left_out:
        text += f"; not read here: {', '.join(result.left_out)}"
    return text
