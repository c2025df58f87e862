"""`steer generate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.answer.detecting import (
    DetectorOption,
    asked_for,
    detections,
    show_detections,
    watch_plan,
    watched,
)
from steer.cli.answer.picture import write_pictures
from steer.cli.answer.strip import strip
from steer.cli.fit.where import WhereChoice
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
from steer.cli.reporting import out, table_out
from steer.cli.steering import LayersOption, VectorOption, chosen_spec, parse_strength
from steer.errors import SteerError, quoted
from steer.model import parse_layer_choice

if TYPE_CHECKING:
    from steer.engines.base import Completion, Engine
    from steer.plan.plan import SteeringPlan
    from steer.readouts.plan import ReadoutPlan
    from steer.readouts.spec import ReadoutSpec
    from steer.registry.registry import Registry


def generate(
    prompt: Annotated[str, typer.Argument(help="What to say to the model.")],
    vector: VectorOption = None,
    strength: Annotated[
        str | None,
        typer.Option(
            "--strength",
            "-x",
            help="Multiples of the vector, or norm=0.1; for a calibrated one also auto, kl=0.2 or "
            "effect=0.8. By default the card's.",
        ),
    ] = None,
    spec: Annotated[
        Path | None, typer.Option("--spec", help="A JSON file with a steering spec.")
    ] = None,
    profile: Annotated[str | None, typer.Option("--profile", help="A saved profile.")] = None,
    layers: LayersOption = None,
    where: Annotated[
        WhereChoice | None, typer.Option(help="Which tokens are steered; by default the card's.")
    ] = None,
    system: Annotated[str | None, typer.Option(help="A system message.")] = None,
    plain: Annotated[
        bool, typer.Option("--plain", help="Continue the text as it is, without chat template.")
    ] = False,
    max_tokens: Annotated[int, typer.Option(min=1, help="The length of the answer.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(min=0.0, max=1.0, help="Nucleus sampling.")] = 1.0,
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    inspect: Annotated[
        str | None,
        typer.Option(
            "--inspect",
            help="What to read of each token, as the JSON of a request's `inspect`: "
            '\'{"projections": [{"vector": "french"}]}\'.',
        ),
    ] = None,
    detector: DetectorOption = None,
    png: Annotated[
        Path | None,
        typer.Option(
            "--png",
            help="Write what --inspect reads of the steered answer here as a heat map, and the "
            "unsteered one's beside it.",
        ),
    ] = None,
    model: ModelOption = DEMO_MODEL,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Answer a prompt twice, side by side: the model as it is, and steered."""
    from steer.engines.base import GenerationRequest, SamplingParams
    from steer.engines.selecting import roles_under
    from steer.prompts import as_chat, render

    asked_readouts = None if inspect is None else parse_readouts(inspect)
    armed = asked_for(detector)
    if png is not None and asked_readouts is None:
        raise SteerError(
            "there is nothing to draw: say with --inspect what to read of each token",
            code="invalid_option",
            param="--png",
        )
    sampling = SamplingParams(
        max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed
    )
    with open_registry(registry, model) as library:
        wanted, overlay = chosen_spec(
            library,
            spec=spec,
            profile=profile,
            vector=vector,
            strength=None if strength is None else parse_strength(strength),
            layers=None if layers is None else parse_layer_choice(layers),
            where=None if where is None else where.value,
        )
        of_profile = () if profile is None else library.profile(profile).detectors
        with running_engine(model, device=device, dtype=dtype) as engine:
            plan = plans(engine, library).plan(wanted, vectors=overlay)
            reads = [
                watch_plan(
                    engine,
                    library,
                    _reads(engine, library, asked_readouts, one),
                    () if one is None else of_profile,
                    armed,
                )
                for one in (None, plan)
            ]
            asked = prompt if plain else as_chat(engine.tokenizer, prompt, system)
            tokens = tuple(render(engine.tokenizer, asked))
            roles = roles_under(engine, plan, asked)
            both = (
                GenerationRequest("default", tokens, sampling),
                GenerationRequest("steered", tokens, sampling, plan, measure=True, roles=roles),
            )
            requests, watches = zip(*map(watched, both, reads), strict=True)
            completions = engine.complete(requests)
            read = [
                _entries(engine.tokenizer, one.own, len(tokens), completion)
                for one, completion in zip(reads, completions, strict=True)
            ]
            texts = [_text(engine.tokenizer, one) for one in completions]
    names = ("default", "steered")
    answers = dict(zip(names, read, strict=True))
    found = dict(zip(names, map(detections, watches), strict=True))
    pictures = [] if png is None else write_pictures(png, answers)
    receipt = completions[1].receipt
    shown = None if receipt is None else receipt.as_json()
    if as_json:
        answer: dict[str, Any] = {"default": texts[0], "steered": texts[1], "steering": shown}
        if inspect is not None:
            answer["readouts"] = answers
        if any(found.values()):
            answer["detections"] = found
        typer.echo(json.dumps(answer, indent=2, ensure_ascii=False))
        return
    show_side_by_side(texts[0], texts[1], shown)
    for title, of_answer in found.items():
        show_detections(title, of_answer)
    for title, entries in answers.items():
        if entries:
            table_out().print(strip(title, entries))
    for one in pictures:
        out().print(f"wrote {one}", highlight=False)


def _reads(
    engine: Engine, library: Registry, spec: ReadoutSpec | None, plan: SteeringPlan | None
) -> ReadoutPlan | None:
    """What is read of one answer; of the unsteered one, what does not ask about the steering."""
    from steer.readouts.compiler import compile_readouts

    if spec is not None and plan is None:
        spec = spec.model_copy(update={"relative_size": False, "kl": False})
    if spec is None or not spec.asked:
        return None
    try:
        return compile_readouts(
            spec, library.for_model(engine.info), engine.info, engine.capabilities, plan
        )
    except SteerError as error:
        error.param = "--inspect" + (error.param or "")
        raise


def _entries(
    tokenizer: Any, plan: ReadoutPlan | None, prompt_length: int, completion: Completion
) -> list[dict[str, Any]]:
    from steer.readouts.answer import ReadoutWriter

    if plan is None:
        return []
    writer = ReadoutWriter(plan, prompt_length, tokenizer)
    own = [(one, plan.own(one.position, one.numbers, prompt_length)) for one in completion.readouts]
    return [
        writer.entry(one.position, one.token, numbers, one.kl)
        for one, numbers in own
        if numbers or one.kl is not None
    ]


def parse_readouts(text: str) -> ReadoutSpec:
    """The read-outs in an option. Raises `SteerError` (`invalid_option`)."""
    from pydantic import ValidationError

    from steer.readouts.spec import ReadoutSpec

    try:
        return ReadoutSpec.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        at = "".join(f"/{part}" for part in first["loc"])
        raise SteerError(
            f"{quoted(text)} does not say what to read: {first['msg']} at {at or '/'}",
            code="invalid_option",
            param="--inspect",
        ) from None


def show_side_by_side(default: str, steered: str, receipt: dict[str, Any] | None) -> None:
    """Two columns, and the receipt below the steered one."""
    from rich.panel import Panel
    from rich.table import Table
    from rich.text import Text

    table = Table.grid(expand=True, padding=(0, 1))
    table.add_column(ratio=1)
    table.add_column(ratio=1)
    subtitle = None
    if receipt is not None:
        points = ", ".join(f"{p['layer']}.{p['site']}" for p in receipt["hook_points"])
        subtitle = f"tokens steered: {receipt['tokens_steered']}, at {points}"
    table.add_row(
        Panel(Text(default), title="default"),
        Panel(Text(steered), title="steered", subtitle=subtitle, border_style="green"),
    )
    table_out().print(table)


def _text(tokenizer: Any, completion: Completion) -> str:
    from steer.prompts import answer_text

    return answer_text(tokenizer, completion.tokens).strip()
