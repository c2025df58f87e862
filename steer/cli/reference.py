"""The command line's reference, in Markdown: `python -m steer.cli.reference docs/cli.md`."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from steer.cli.app import app


def reference() -> str:
    """Every command with its arguments and options, from the commands themselves."""
    root = typer.main.get_command(app)
    head = [
        "# The command line",
        "",
        "Made from the commands themselves by `python -m steer.cli.reference docs/cli.md`. An "
        "error is one line on stderr with its code, and the exit code is 2.",
        "",
    ]
    return "\n".join([*head, *_command(root, "steer")])


def _command(command: Any, path: str) -> Iterator[str]:
    yield f"{'#' * min(len(path.split()) + 1, 4)} `{path}`"
    yield ""
    yield (command.help or "").strip()
    yield ""
    yield from _parameters(command)
    for name, child in getattr(command, "commands", {}).items():
        yield from _command(child, f"{path} {name}")


def _parameters(command: Any) -> Iterator[str]:
    shown = [parameter for parameter in command.params if parameter.name != "help"]
    if not shown:
        return
    yield "| Argument or option | Default | What |"
    yield "|---|---|---|"
    for parameter in shown:
        yield f"| {_spelling(parameter)} | {_default(parameter)} | {_help(parameter)} |"
    yield ""


def _spelling(parameter: Any) -> str:
    if parameter.param_type_name == "argument":
        return f"`{parameter.name.upper()}`"
    names = [*parameter.opts, *parameter.secondary_opts]
    return ", ".join(f"`{name}`" for name in names)


def _default(parameter: Any) -> str:
    if parameter.required:
        return "required"
    default = getattr(parameter.default, "value", parameter.default)
    return "" if default in (None, False, "", ()) else f"`{default}`"


def _help(parameter: Any) -> str:
    return (parameter.help or "").replace("|", "\\|")


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(reference(), "utf-8")
