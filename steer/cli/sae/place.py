"""What commands of `steer sae` work on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any

import typer

from steer.cli.local import open_registry, running_engine

if TYPE_CHECKING:
    from steer.engines.transformers.engine import TransformersEngine
    from steer.registry.registry import Registry

SAEArgument = Annotated[str, typer.Argument(help="The SAE, by its name.")]
JsonOption = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@contextmanager
def working(
    *, model: str, registry: str | None, device: str | None, dtype: str | None, **_others: Any
) -> Iterator[tuple[TransformersEngine, Registry]]:
    """The model and the registry that a command's values name."""
    with (
        open_registry(registry, model) as library,
        running_engine(model, device=device, dtype=dtype) as engine,
    ):
        yield engine, library
