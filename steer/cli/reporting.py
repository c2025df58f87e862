"""How the command line answers: tables to stdout, an error as one red line to stderr."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, TextIO

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from typer.core import TyperGroup

from steer.errors import Problem, SteerError

FAILED = 2
"""The exit code for whatever was wrong with the request."""

CRASHED = 1
"""The exit code for what is wrong with Steer."""

TRACEBACK_VARIABLE = "STEER_TRACEBACK"


def out() -> Console:
    """Where results go."""
    return Console(soft_wrap=True)


def table_out() -> Console:
    """Where tables go: folded to the terminal's width."""
    return Console()


def err() -> Console:
    """Where errors and progress go, so that results can be piped."""
    return Console(stderr=True, soft_wrap=True)


def nothing_yet(what: str, command: str | None = None) -> None:
    """One quiet line to stderr: where `what`, such as vectors, come from; `command` adds one."""
    adding = command or f"steer {what} add"
    err().print(
        f"[dim]No {what} yet: `{adding}` takes a file, and those of the demo model come "
        "with its first `steer generate` or `steer serve`.[/dim]",
        highlight=False,
    )


class ReportingGroup(TyperGroup):
    """Turns a `SteerError` from any command below into red lines and exit code 2.

    Anything else is a fault of Steer's own: one red line with exit code 1, and the traceback for
    who asks for it.
    """

    def invoke(self, ctx: Any) -> Any:
        print_anything(sys.stdout, sys.stderr)
        try:
            return super().invoke(ctx)
        except SteerError as error:
            show_problems(error.problems)
            raise typer.Exit(FAILED) from None
        except (typer.TyperException, typer.Exit, typer.Abort, BrokenPipeError):
            raise
        except Exception as error:
            if os.environ.get(TRACEBACK_VARIABLE):
                raise
            show_problems([Problem(_unexpected(error), "internal_error")])
            raise typer.Exit(CRASHED) from None


def print_anything(*streams: TextIO) -> None:
    """Has terminals and pipes without Unicode show `?` for what they cannot, and not fail."""
    for stream in streams:
        if isinstance(stream, io.TextIOWrapper) and stream.errors == "strict":
            stream.reconfigure(errors="replace")


def _unexpected(error: Exception) -> str:
    first = next(iter(str(error).splitlines()), "")
    return (
        f"{type(error).__name__}: {first} — a fault of Steer, please report it; the same command "
        f"with {TRACEBACK_VARIABLE}=1 shows where it happened"
    )


def show_problems(problems: Sequence[Problem]) -> None:
    """One red line per problem: the sentence, the code, and where in the request it is."""
    console = err()
    for problem in problems:
        where = f", at {problem.param}" if problem.param else ""
        console.print(
            f"[red]error:[/red] [red]{escape(problem.message)}[/red] "
            f"[dim]({escape(problem.code + where)})[/dim]",
            highlight=False,
        )


@contextmanager
def progress_bar(title: str, total: int) -> Iterator[Any]:
    """A bar on stderr, if that is a terminal; yields a function that takes how many are done."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    console = Console(stderr=True)
    quiet = not console.is_terminal
    with Progress(*columns, console=console, transient=True, disable=quiet) as progress:
        task = progress.add_task(title, total=total)
        yield lambda done: progress.advance(task, done)


@contextmanager
def bars_one_by_one() -> Iterator[Callable[[int, str], Any]]:
    """Gives a function that begins a bar of so many of what, and ends the one before."""
    with ExitStack() as bars:

        def begin(total: int, what: str) -> Any:
            bars.close()
            return bars.enter_context(progress_bar(what, total))

        yield begin
