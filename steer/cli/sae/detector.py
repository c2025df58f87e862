"""`steer sae detector`: a feature as a detector."""

from __future__ import annotations

from typing import Annotated

import typer

from steer.cli.local import DEMO_MODEL, ModelOption, RegistryOption, open_registry
from steer.cli.sae.place import SAEArgument
from steer.cli.sae.tables import say


def detector(
    sae: SAEArgument,
    feature: Annotated[int, typer.Argument(min=0, help="The feature's number.")],
    threshold: Annotated[
        float | None,
        typer.Option(help="The activation that it must exceed; by default the feature's own."),
    ] = None,
    detects: Annotated[
        str | None, typer.Option(help="What it detects; by default the feature's label.")
    ] = None,
    name: Annotated[
        str | None, typer.Option("--name", "-n", help="By default <SAE>-<feature>.")
    ] = None,
    model: ModelOption = DEMO_MODEL,
    registry: RegistryOption = None,
) -> None:
    """Register a feature as a detector, which serves without the SAE."""
    from steer.registry.features.detectors import add_feature_detector

    with open_registry(registry, model) as library:
        entry, created = add_feature_detector(
            library, sae, feature, name=name, threshold=threshold, detects=detects
        )
    say(f"{'registered' if created else 'already registered:'} {entry.id}")
