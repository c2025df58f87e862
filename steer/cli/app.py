"""The `steer` command and its sub-commands."""

from __future__ import annotations

from importlib.metadata import version
from typing import Annotated

import typer

from steer.cli import (
    inspecting,
    jobs,
    names,
    profiles,
    registry,
    serve,
    validate,
    vectors,
)
from steer.cli.answer import generate
from steer.cli.fit import capturing, make
from steer.cli.fit import commands as fit
from steer.cli.inspection.attribution import attribution
from steer.cli.inspection.clusters import clusters
from steer.cli.inspection.concepts import concepts
from steer.cli.inspection.coordinates import coordinates
from steer.cli.inspection.flow import flow
from steer.cli.inspection.matching import match
from steer.cli.inspection.tracing import trace
from steer.cli.inspection.weights import weights
from steer.cli.measure import calibrate, evaluate, sweep
from steer.cli.reporting import ReportingGroup
from steer.cli.sae import commands as sae


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"steer {version('steer-llm')}")
        raise typer.Exit


app = typer.Typer(
    name="steer",
    cls=ReportingGroup,
    help="Steer language models: per-request control vectors, SAE clamps and inspection.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def main(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_show_version, is_eager=True, help="Print the version, and exit."
        ),
    ] = False,
) -> None:
    """Steer language models: per-request control vectors, SAE clamps and inspection."""


app.command("serve")(serve.serve)
app.command("generate")(generate.generate)
app.command("make")(make.make)
app.add_typer(fit.app, name="fit")
app.command("sweep")(sweep.sweep)
app.command("calibrate")(calibrate.calibrate)
app.command("evaluate")(evaluate.evaluate)
app.command("validate")(validate.validate)
app.add_typer(vectors.app, name="vectors")
app.add_typer(profiles.app, name="profiles")
app.add_typer(registry.app, name="registry")
app.add_typer(names.aliases, name="aliases")
app.add_typer(names.tags, name="tags")
app.add_typer(sae.app, name="sae")
inspecting.app.command("attribution")(attribution)
inspecting.app.command("trace")(trace)
inspecting.app.command("weights")(weights)
inspecting.app.command("match")(match)
inspecting.app.command("coordinates")(coordinates)
inspecting.app.command("clusters")(clusters)
inspecting.app.command("concepts")(concepts)
inspecting.app.command("flow")(flow)
app.add_typer(inspecting.app, name="inspect")
app.command("capture")(capturing.capture)
app.add_typer(jobs.app, name="jobs")
