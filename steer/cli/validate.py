"""`steer validate`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

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
from steer.cli.reporting import FAILED, out, show_problems
from steer.cli.steering import read_spec
from steer.references import own_references, value_at


def validate(
    spec: Annotated[Path, typer.Argument(help="A JSON file with a steering spec, or a profile.")],
    model: ModelOption = DEMO_MODEL,
    syntax_only: Annotated[
        bool, typer.Option("--syntax-only", help="Check the file alone: no model, no registry.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
    registry: RegistryOption = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
) -> None:
    """Check a spec against a model and the registry: every problem at once, or the plan."""
    wanted = read_spec(spec)
    if syntax_only:
        out().print(f"{spec}: well-formed, fingerprint {wanted.fingerprint()}", highlight=False)
        return
    with (
        open_registry(registry, model) as library,
        running_engine(model, device=device, dtype=dtype) as engine,
    ):
        cache = plans(engine, library)
        problems = cache.check(wanted)
        if problems:
            show_problems(problems)
            raise typer.Exit(FAILED)
        described = cache.plan(wanted).describe()
    if as_json:
        typer.echo(json.dumps(described, indent=2, ensure_ascii=False))
        return
    out().print(f"{spec}: valid, fingerprint {described['fingerprint']}", highlight=False)
    for place, entry in enumerate(described["interventions"]):
        points = ", ".join(entry["hook_points"])
        named = own_references(wanted.interventions[place])
        names = ", ".join(_told(value_at(entry, reference.param)) for reference in named)
        out().print(f"  {place}. {entry['kind']} {names} at {points}", highlight=False)


def _told(named: Any) -> str:
    """What an intervention names, as its plan tells it."""
    return f"token {named['token']}" if isinstance(named, dict) else str(named)
