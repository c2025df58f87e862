"""What a kind of job is, and what its function is given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from pydantic import BaseModel

from steer.engines.base import Engine
from steer.registry.registry import Registry

P = TypeVar("P", bound=BaseModel)


class Report(Protocol):
    """Tells how far a job is; raises where it has to stop."""

    def __call__(self, done: int, total: int | None = None, note: str = "") -> None: ...


@dataclass(frozen=True)
class JobContext:
    """What a job works with.

    `engine` gives way to the requests of clients. `scratch` is an empty folder that is removed
    when the job ends, `files` the folder with what the client sent (missing where it sent none),
    `answers` the file in which the next attempt finds what other models have said (None: nowhere).
    `outputs` is a folder that the job may make, for files that clients fetch (None: there is none):
    those of an earlier attempt are in it, and they are kept with a job that succeeds.
    `progress` is called as often as a function likes; that is also where a cancelled job stops, by
    a `JobStopped` that must not be caught.
    """

    engine: Engine
    registry: Registry
    scratch: Path
    files: Path
    progress: Report
    answers: Path | None = None
    outputs: Path | None = None

    def counter(self, total: int, note: str = "") -> Callable[[int], None]:
        """`progress` for functions that tell how many units were just finished."""
        done = 0

        def count(units: int) -> None:
            nonlocal done
            done += units
            self.progress(done, total, note)

        self.progress(0, total, note)
        return count


def _nothing(_engine: Engine, _registry: Registry, _params: Any) -> None:
    """No check beyond the parameters' own."""


@dataclass(frozen=True)
class JobKind(Generic[P]):
    """A kind of job.

    `params` is a frozen pydantic model with `extra="forbid"`. `run` returns a JSON object, or
    raises a `SteerError` that a client can understand. `check` raises what is wrong with the
    parameters before the job is queued. `data` names the parameters that are too large to be
    shown with the job; `shown` adds something in their place. `summary` says in a line what it
    does. The name is also the end of its route.

    `repeatable` says that running it twice does no harm, so that it is run again after a crash.
    `any_model` says that it does not use the engine, so that any server on the registry can run it;
    a function says it of the engine where it was asked for and the parameters.
    """

    name: str
    params: type[P]
    run: Callable[[JobContext, P], dict[str, Any]]
    check: Callable[[Engine, Registry, P], None] = _nothing
    data: frozenset[str] = frozenset()
    summary: str = ""
    shown: Callable[[P], dict[str, Any]] = field(default=lambda _: {})
    repeatable: bool = False
    any_model: bool | Callable[[Engine, P], bool] = False

    def runs_anywhere(self, engine: Engine, params: P) -> bool:
        """Whether servers of other models than that of `engine` may run it."""
        return self.any_model(engine, params) if callable(self.any_model) else self.any_model

    def described(self, params: P) -> dict[str, Any]:
        """The parameters without their data, as a JSON object."""
        plain = params.model_dump(
            mode="json", by_alias=True, exclude_none=True, exclude=set(self.data)
        )
        return {**plain, **self.shown(params)}


JobKinds = Mapping[str, JobKind[Any]]
