"""From a request's model to the options of a command: each field is one, described once.

A field's name, type, default, bounds and description become the option's; `Spelled` among its
metadata says what the type cannot. Texts such as `2-5` are read by `_READERS`. A command is the
options of its request, and the few parameters that the command line alone has (`keyword`).
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Collection, Iterator, Mapping
from enum import StrEnum
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from annotated_types import Ge, Le
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from steer.cli.local import (
    DEMO_MODEL,
    DeviceOption,
    DtypeOption,
    ModelOption,
    RegistryOption,
)
from steer.cli.steering import WHERES
from steer.errors import Problem, SpecError, SteerError, pointer
from steer.fit.data.where import WhereName
from steer.fit.requests.fields import Spelled
from steer.model import parse_layer_choice, parse_layers
from steer.spec import SITES, Site

Request = TypeVar("Request", bound=BaseModel)
MAX_LAYERS = 1024


def keyword(
    name: str, annotation: Any, default: Any = inspect.Parameter.empty
) -> inspect.Parameter:
    """A parameter of a command that is no field of its request."""
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


MODEL = keyword("model", ModelOption, DEMO_MODEL)
PLACE = (
    keyword("registry", RegistryOption, None),
    keyword("device", DeviceOption, None),
    keyword("dtype", DtypeOption, None),
)
"""Where a command works, besides its `MODEL`."""


def command(
    run: Callable[[dict[str, Any]], None],
    parameters: Collection[inspect.Parameter],
    *,
    summary: str,
) -> Callable[..., None]:
    """A function for typer with `parameters`, which hands their values to `run`."""

    def called(**values: Any) -> None:
        run(values)

    called.__doc__ = summary
    called.__annotations__ = {}
    called.__signature__ = inspect.Signature(list(parameters))  # type: ignore[attr-defined]
    return called


def options(
    model: type[BaseModel], *, leave_out: Collection[str] = ()
) -> Iterator[inspect.Parameter]:
    """The options of `model`'s fields, in their order."""
    for name, field in model.model_fields.items():
        spelled = spelling(field)
        if name in leave_out or spelled.hidden:
            continue
        kind, default = _typed(name, field, spelled)
        text = spelled.help or field.description
        if spelled.argument:
            yield keyword(name, Annotated[kind, typer.Argument(help=text)], default)
            continue
        flags = spelled.flags or (f"--{name.replace('_', '-')}",)
        bounds = {} if kind not in (int, float, int | None) else _bounds(field)
        yield keyword(name, Annotated[kind, typer.Option(*flags, help=text, **bounds)], default)


def spelling(field: FieldInfo) -> Spelled:
    """How the command line spells `field`."""
    return next((one for one in field.metadata if isinstance(one, Spelled)), Spelled())


def read_values(model: type[BaseModel], values: Mapping[str, Any]) -> dict[str, Any]:
    """The values of options as those of fields. Raises `SteerError` for a text that cannot be
    read; an option that was not given is left to the field's default."""
    found = {}
    for name, field in model.model_fields.items():
        value = values.get(name)
        if value is None:
            continue
        if isinstance(value, StrEnum):
            value = value.value
        reads = _reads(field)
        found[name] = value if reads is None else _READERS[reads](value)
    return found


def checked(kind: type[Request], fields: Mapping[str, Any]) -> Request:
    """The request; raises `SpecError` with every problem of its fields."""
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        problems = [
            Problem(
                f"{item['msg'].removeprefix('Value error, ')}; got {str(item['input'])[:60]!r}",
                "invalid_option",
                pointer(*item["loc"]),
            )
            for item in error.errors(include_url=False)
        ]
        raise SpecError(problems[0].message, problems=problems) from None


def parse_strengths(text: str) -> list[float]:
    """Comma-separated numbers, in order, each once; raises `SteerError`."""
    return sorted(set(parse_numbers(text, "strengths")))


def parse_numbers(text: str, what: str = "numbers") -> list[float]:
    """Comma-separated numbers, as they stand; raises `SteerError`."""
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or not all(abs(value) < float("inf") for value in found):
        raise SteerError(
            f"{text!r} is no list of {what}: write numbers such as 0.5,1,2",
            code="invalid_option",
        )
    return found


def _place(text: str) -> int | str:
    """An index, or a piece of a text."""
    try:
        return int(text)
    except ValueError:
        return text


def _position(text: str) -> Any:
    """A position: a name, an index, or a selection."""
    if text in ("last", "mean", "response", "subject"):
        return text
    if text.lstrip().startswith("{"):
        return parse_selection(text)
    try:
        return int(text)
    except ValueError:
        raise SteerError(
            f"{text!r} is no position: use last, mean, response, subject, an index or a selection "
            "as JSON",
            code="invalid_option",
        ) from None


def parse_selection(text: str) -> dict[str, Any]:
    """Which tokens: the name of a place (`generation`), or a spec's `where` as JSON. Raises
    `SteerError` for what is neither; the fields are for a request to check."""
    if text in WHERES:
        return WHERES[text]
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise SteerError(
            f"{text[:60]!r} is no selection: use {', '.join(WHERES)}, or JSON such as "
            '{"roles": ["user"]}',
            code="invalid_option",
        )
    return value


def _site(text: str) -> str:
    if text not in SITES:
        raise SteerError(
            f"{text!r} is not a site: use one of {', '.join(SITES)}", code="unsupported_site"
        )
    return text


def _point(text: str) -> dict[str, Any]:
    """A hook point, as `5.mlp_out`."""
    layer, _, site = text.strip().partition(".")
    if not layer.isdecimal():
        raise SteerError(
            f"{text!r} is no hook point: write LAYER.SITE, such as 5.mlp_out", code="invalid_option"
        )
    return {"layer": parse_layers(layer, param="/points")[0], "site": _site(site or "resid_post")}


def _prompt(text: str) -> Any:
    """A prompt: JSON where it is JSON, else a text."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return text
    return value if isinstance(value, list | dict) else text


_READERS: Mapping[str, Callable[[Any], Any]] = {
    "layers": parse_layer_choice,
    "points": lambda text: [_point(one) for one in text.split(",")],
    "position": _position,
    "place": _place,
    "selection": parse_selection,
    "tokens": lambda text: parse_selection(text) if text.lstrip().startswith("{") else text,
    "site": _site,
    "strengths": parse_strengths,
    "numbers": parse_numbers,
    "names": lambda text: text.split(","),
    "form": _prompt,  # a name, or JSON
    "sae": lambda text: {"sae": text},
    "prompt": _prompt,
    "where": lambda name: WHERES[name],
}
"""How an option's text is read, by what `Spelled.reads` calls it."""


def _reads(field: FieldInfo) -> str | None:
    kind: Any = field.annotation
    return "site" if kind == Site else spelling(field).reads


def _typed(name: str, field: FieldInfo, spelled: Spelled) -> tuple[Any, Any]:
    """The option's type and default: texts where a reader takes over."""
    required = field.default is PydanticUndefined
    default = inspect.Parameter.empty if required else field.default
    kind: Any = field.annotation
    choices: Any = WhereName if spelled.reads == "where" else kind
    if get_origin(choices) is Literal and choices != Site:
        kind = StrEnum(name, {one: one for one in get_args(choices)})  # type: ignore[misc, no-redef]
        default = kind(default) if isinstance(default, str) else default
    elif _reads(field) is not None:
        kind = str
        if isinstance(default, tuple):
            default = ",".join(f"{one:g}" for one in default)
    else:
        kind = _optional(kind) or kind
    return (kind | None if default is None else kind), default


def _optional(kind: Any) -> Any:
    """The plain type of a field that holds one, bounded in some way, or None; else None."""
    inner = [one for one in get_args(kind) if one is not type(None)]
    if len(inner) != 1 or get_origin(inner[0]) is not Annotated:
        return None
    plain = get_args(inner[0])[0]
    return plain if plain in (str, int, float) else None


def _bounds(field: FieldInfo) -> dict[str, Any]:
    """The bounds that typer checks by itself; the model checks all of them."""
    found: dict[str, Any] = {}
    for one in field.metadata:
        if isinstance(one, Ge):
            found["min"] = one.ge
        elif isinstance(one, Le):
            found["max"] = one.le
    return found
