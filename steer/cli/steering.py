"""From options to a plan: a spec file, a saved profile, or one vector and a strength."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

import typer

from steer.errors import FileFormatError, SpecError
from steer.fit.data.where import WHERES as PLACES
from steer.model import SomeLayersOrAll
from steer.spec import SteeringSpec, parse_spec

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.registry.registry import Registry

VectorOption = Annotated[
    str | None,
    typer.Option("--vector", "-v", help="A registered vector (name or name@hash), or a file."),
]
LayersOption = Annotated[
    str | None,
    typer.Option(
        "--layers", help="Such as 2-5 or 1,3, or all that the vector has; by default the card's."
    ),
]
StrengthValue: TypeAlias = float | Literal["auto"] | dict[str, float]
EVERY_TOKEN: dict[str, Any] = {"phases": ["prompt", "generation"]}
WHERES: Mapping[str, dict[str, Any]] = {
    name: EVERY_TOKEN if where is None else where.model_dump(mode="json", exclude_none=True)
    for name, where in PLACES.items()
}
"""The places of fitted vectors as a spec says them; on every token is said too, because a spec that
says nothing leaves it to the card."""


def read_json(path: Path) -> Any:
    """The JSON in a file; raises `FileFormatError`."""
    try:
        return json.loads(path.read_text("utf-8-sig"))
    except OSError as error:
        raise FileFormatError(
            f"{str(path)!r} cannot be read: {error.strerror or error}", code="no_such_file"
        ) from error
    except (ValueError, RecursionError) as error:
        raise FileFormatError(f"{str(path)!r} is not JSON: {error}", code="invalid_json") from error


def read_spec(path: Path) -> SteeringSpec:
    """The spec in a file, or the spec of the profile in a file. Raises `SpecError` with all its
    problems."""
    value = read_json(path)
    if isinstance(value, dict) and "spec" in value and "interventions" not in value:
        return parse_spec(_object(value["spec"], path), at="/spec")
    return parse_spec(_object(value, path))


def chosen_spec(
    registry: Registry,
    *,
    spec: Path | None,
    profile: str | None,
    vector: str | None,
    strength: StrengthValue | None,
    layers: SomeLayersOrAll | None,
    where: str | None,
) -> tuple[SteeringSpec, dict[str, ControlVector]]:
    """The spec that the options ask for, and the vectors that come from files."""
    if sum(option is not None for option in (spec, profile, vector)) != 1:
        raise SpecError(
            "say how to steer with exactly one of --vector, --spec and --profile",
            code="invalid_option",
        )
    if vector is None and not (strength is None and layers is None and where is None):
        raise SpecError(
            "--strength, --layers and --where go with --vector: write them into the spec",
            code="invalid_option",
        )
    if spec is not None:
        return read_spec(spec), {}
    if profile is not None:
        return registry.profile(profile).spec, {}
    name, overlay = named_vector(vector or "")
    return add_spec(name, strength, layers, where), overlay


def named_vector(ref: str) -> tuple[str, dict[str, ControlVector]]:
    """The name to use in a spec; for a file, also the vector under that name."""
    path = Path(ref)
    if not (path.suffix in (".safetensors", ".gguf") or "/" in ref):
        return ref, {}
    vector = read_vector_file(path)
    return vector.card.name, {vector.card.name: vector}


def read_vector_file(path: Path) -> ControlVector:
    """The control vector in a file of any known format. Raises `FileFormatError`."""
    from steer.artefacts.control_vector import ControlVector
    from steer.formats.importing import read_artefact
    from steer.formats.options import ImportOptions

    if not path.is_file():
        raise FileFormatError(f"there is no file {str(path)!r}", code="no_such_file")
    artefact = read_artefact(
        path, ImportOptions(), scratch=None, unpacked_limit=path.stat().st_size
    )
    if not isinstance(artefact, ControlVector):
        raise FileFormatError(
            f"{str(path)!r} holds a {artefact.card.kind}, not a vector", code="wrong_kind"
        )
    return artefact.renamed(path.stem)


def parse_strength(text: str) -> StrengthValue:
    """`1.5`, `auto`, or one of `kl=0.2`, `effect=0.8` and `norm=0.1`, as in a spec. Raises
    `SpecError`."""
    if text == "auto":
        return "auto"
    unit, equals, number = text.rpartition("=")
    value: float | None
    try:
        value = float(number)
    except ValueError:
        value = None
    if value is None or unit not in ({"kl", "effect", "norm"} if equals else {""}):
        raise SpecError(
            f"{text!r} is not a strength: write a number, auto, kl=0.2, effect=0.8 or norm=0.1",
            code="invalid_option",
        )
    return {unit: value} if unit else value


def vector_of(registry: Registry, ref: str) -> ControlVector:
    """The registered vector, or the one in a file. Raises `SteerError`."""
    name, overlay = named_vector(ref)
    return overlay[name] if name in overlay else registry.vector(name)


def add_spec(
    name: str, strength: StrengthValue | None, layers: SomeLayersOrAll | None, where: str | None
) -> SteeringSpec:
    """Adding one vector; whatever is None is as its card says. Raises `SpecError`."""
    item: dict[str, Any] = {"kind": "add", "vector": name}
    if strength is not None:
        item["strength"] = strength
    if layers is not None:
        item["layers"] = layers
    if where is not None:
        item["where"] = WHERES[where]
    return parse_spec({"interventions": [item]})


def _object(value: Any, path: Path) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise SpecError(f"{str(path)!r} does not hold a spec: a spec is a JSON object")
    return value
