"""Which layers and positions a request reads, under which steering, and how much that may be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal, TypeAlias, TypeVar

from pydantic import BeforeValidator, Discriminator, Field, Tag

from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.lens import Lens
from steer.artefacts.library import Library, MemoryLibrary
from steer.engines.base import Engine
from steer.engines.plans import plans_of
from steer.engines.selecting import TokenChoice
from steer.errors import SpecError, SteerError, TooLarge, UnknownArtefact, pointer
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import EncodedPrompt, Place
from steer.prompts.roles import RoleRanges
from steer.spec import Layer, Site, SteeringSpec, Where
from steer.spec.base import check_layers_form, layers_tag

Fitting = TypeVar("Fitting", Lens, ConceptProbe)

MAX_NUMBERS = 1 << 16
"""The most numbers that one answer holds."""

LayerChoice: TypeAlias = Annotated[
    Annotated[
        tuple[Layer, ...],
        Field(min_length=1, max_length=1024, fail_fast=True),
        Tag("numbers"),
    ]
    | Annotated[Literal["all"], Tag("a word")],
    Discriminator(layers_tag),
    BeforeValidator(check_layers_form),
]


def _form(value: Any) -> str:
    if isinstance(value, str):
        return "a word"
    return "a selection" if isinstance(value, Mapping | Where) else "places"


PositionChoice: TypeAlias = Annotated[
    Annotated[
        tuple[Place, ...],
        Field(min_length=1, max_length=1 << 16, fail_fast=True),
        Tag("places"),
    ]
    | Annotated[Literal["all"], Tag("a word")]
    | Annotated[Where, Tag("a selection")],
    Discriminator(_form),
]
"""Which tokens of the prompt are read: places in it, all, or those that a selection names."""


def chosen_points(
    engine: Engine, layers: LayerChoice, site: Site, *, at: str = "/layers"
) -> tuple[HookPoint, ...]:
    """The hook points of `layers` at `site`, each once, in the order given."""
    if layers == "all":
        points = [HookPoint(layer, site) for layer in range(engine.info.n_layers)]
        engine.info.check_point(points[0], param="/site")
        return tuple(points)
    for place, layer in enumerate(layers):
        engine.info.check_point(HookPoint(layer), param=at + pointer(place))
        engine.info.check_point(HookPoint(layer, site), param="/site")
    return tuple(HookPoint(layer, site) for layer in dict.fromkeys(layers))


def chosen_positions(
    engine: Engine, prompt: EncodedPrompt, positions: PositionChoice, *, at: str = "/positions"
) -> tuple[int, ...]:
    """Absolute positions, each once, in the order given, or rising where a selection names them.

    Raises `SteerError`: `nothing_selected` for a selection of no token.
    """
    if isinstance(positions, Where):
        choice = TokenChoice.of(engine, positions, at=at)
        chosen = choice.positions(prompt.ids, lambda: prompt.roles)
        if not chosen:
            raise SpecError(
                f"{at[1:]!r} selects none of the prompt's {len(prompt.ids)} tokens: what is read "
                "is the prompt, of which nothing was generated",
                param=at,
                code="nothing_selected",
            )
        return chosen
    if positions == "all":
        return tuple(range(len(prompt.ids)))
    found = [prompt.position(p, param=at + pointer(n)) for n, p in enumerate(positions)]
    return tuple(dict.fromkeys(found))


def registered(
    engine: Engine,
    library: Library | None,
    kind: str,
    name: str,
    finder: Callable[[Library], Callable[[str], Fitting]],
) -> Fitting:
    """The artefact that the field `kind` of a request names, of this model. Raises
    `UnknownArtefact` where there is none, or no registry, and what `check_fits` raises."""
    if library is None:
        raise UnknownArtefact(
            f"there is no registry to find the {kind} {name!r} in",
            code=f"unknown_{kind}",
            param=f"/{kind}",
        )
    try:
        found = finder(library)(name)
        found.check_fits(engine.info)
    except SteerError as error:
        raise error.at(f"/{kind}") from None
    return found


def check_size(parts: Sequence[tuple[str, int]], *, advice: str, limit: int = MAX_NUMBERS) -> None:
    """Raises `TooLarge` where the product of `parts` (name, count) passes `limit`."""
    total = 1
    for _, count in parts:
        total *= count
    if total > limit:
        product = " × ".join(f"{count} {name}" for name, count in parts)
        raise TooLarge(
            f"{product} make {total:,}, more than the {limit:,} that one answer may hold: {advice}",
            code="answer_too_large",
            param="/positions",
        )


def plan_for(
    engine: Engine, spec: SteeringSpec | None, plans: PlanCache | None, *, at: str
) -> SteeringPlan | None:
    """The plan of a request's `steering`, which stands at the pointer `at`.

    Without `plans` only vectors inside the spec are known.
    """
    if spec is None:
        return None
    cache = plans or plans_of(engine, MemoryLibrary())
    try:
        return cache.plan(spec)
    except SteerError as error:
        error.param = at + (error.param or "")
        raise


def roles_for(plan: SteeringPlan | None, prompt: EncodedPrompt) -> RoleRanges | None:
    """Whose words the tokens of `prompt` are, where `plan` asks."""
    return None if plan is None or not plan.reads_roles else prompt.roles
