"""What an inspection is: one method in one file, one line in the table of `steer.inspection`.

Routes are made from the table, and an engine offers what its capabilities allow. A command of
`steer inspect` is written by hand (`steer/cli/inspecting.py`), because its options are chosen for
people; a method without one is still served, listed and called from Python.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Annotated, Any, Protocol, TypeAlias

from pydantic import AfterValidator, BaseModel

from steer.engines.base import Engine
from steer.errors import NotFinite, Unsupported
from steer.inspection.state_file import StateFile
from steer.model import Capabilities
from steer.spec import Site

STREAM: tuple[Site, ...] = ("resid_pre", "resid_mid", "resid_post")
"""The sites that hold the residual stream itself, which the output matrix can read."""


def _finite(number: float) -> float:
    if not math.isfinite(number):
        raise NotFinite(
            f"a reading is {number!r}: the states are too large for what reads them; use a smaller "
            "strength, or another artefact to read with"
        )
    return number


Finite: TypeAlias = Annotated[float, AfterValidator(_finite)]
"""A number in an answer: JSON has neither NaN nor infinity, and neither says anything."""


@contextmanager
def at_field(param: str) -> Iterator[None]:
    """What an engine refuses inside the block was asked for by the field `param`."""
    try:
        yield
    except Unsupported as error:
        raise error.at(param) from None


class Picture(Protocol):
    """What a result is drawn as: a heat map, or points in a plane."""

    def png(self) -> bytes:
        """The picture's bytes. Raises `TooLarge` for more than can be seen."""


@dataclass(frozen=True)
class Inspection:
    """A method: `run(engine, request, plans=…, library=…)` gives a result, which `draw` pictures.

    `name` is its name in `/v1/steering/capabilities` and, with hyphens, its route. `possible` says
    whether an engine can carry it out. `summary` is the route's description. `file` gives the
    result as a `StateFile` of any size, where there is such a form.
    """

    name: str
    summary: str
    request: type[BaseModel]
    result: type[BaseModel]
    run: Callable[..., BaseModel]
    draw: Callable[[Any], Picture]
    possible: Callable[[Capabilities], bool]
    file: Callable[..., StateFile] | None = None

    def require(self, engine: Engine) -> None:
        """Raises `Unsupported` (`unsupported_inspection`) where `engine` cannot carry it out."""
        if not self.possible(engine.capabilities):
            raise Unsupported(
                f"the {engine.capabilities.engine} engine has no {self.name!r} inspection: "
                f"{self._lacks(engine)}; /v1/steering/capabilities lists the "
                "inspections there are",
                code="unsupported_inspection",
            )

    def _lacks(self, engine: Engine) -> str:
        able = engine.capabilities
        if able.no_unembedding and self.possible(replace(able, no_unembedding=None)):
            return able.no_unembedding
        if not able.attention and self.possible(replace(able, attention=True)):
            return "it does not tell what the heads of this model attend to"
        for site, reason in engine.info.absent:
            more = replace(
                able,
                captures=(*able.captures, site),
                projections=(*able.projections, site),
                attention=True,
            )
            if self.possible(more):
                return f"the site {site!r} {reason}"
        states = ", ".join(able.captures) or "no states"
        return f"it can capture {states}, which is not enough for it"


def reads_states(able: Capabilities) -> bool:
    """Whether states can be read at all."""
    return bool(able.captures)


def reads_stream(able: Capabilities) -> bool:
    """Whether the residual stream can be read."""
    return not set(STREAM).isdisjoint(able.captures)


def reads_logits(able: Capabilities) -> bool:
    """Whether the residual stream can be read, and read as next-token logits."""
    return reads_stream(able) and able.no_unembedding is None
