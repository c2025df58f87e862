"""A soft projection on the states of a concept (conceptors)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, StrictFloat, StrictInt

from steer.errors import SteerError, pointer
from steer.fit.data.where import WhereName
from steer.fit.requests.fields import (
    MAX_ITEMS,
    CaptureField,
    DataField,
    LayerList,
    NameField,
    SiteField,
    Spelled,
    TokensField,
)
from steer.fit.requests.inline import PROMPTS
from steer.fit.requests.request import CardFields, FitPlace, Fitted
from steer.prompts import PromptParam

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.model import HookPoint
    from steer.registry.registry import Registry


class ConceptorRequest(CardFields):
    """Prompts whose states are the concept's."""

    command: ClassVar = "conceptor"
    summary: ClassVar = "Fit a soft projection on the states of prompts (conceptors)."
    form: ClassVar = PROMPTS
    batch_size: ClassVar = 16

    name: NameField
    prompts: (
        Annotated[
            tuple[PromptParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    layers: Annotated[
        LayerList,
        Spelled("layers", "Such as 2-5 or 1,3."),
        Field(description="The layers to act on."),
    ]
    aperture: Annotated[
        StrictFloat,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="a: a direction counts half where its mean square is 1/a².",
        ),
    ] = 0.1
    rank: Annotated[
        Annotated[StrictInt, Field(ge=1)] | None,
        Field(description="How many directions are kept; by default the fewest that suffice."),
    ] = None
    max_error: Annotated[
        StrictFloat,
        Field(gt=0, lt=1, description="The most of the conceptor that may be left out."),
    ] = 0.1
    site: SiteField = "resid_post"
    tokens: TokensField = "all"
    where: Annotated[
        WhereName,
        Field(
            description="Where the edit acts unless a request says otherwise: on the last prompt "
            "token, on that and what is generated (onward), on what is generated, or on every "
            "token."
        ),
    ] = "all"

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        for place, layer in enumerate(self.layers):
            yield pointer("layers", place), HookPoint(layer, self.site)

    def check(self, engine: Engine, registry: Registry, data: list[Prompt]) -> None:
        width = engine.info.width(self.site)
        if self.rank is not None and self.rank > width:
            raise SteerError(
                f"a rank must be from 1 to the width, {width}; got {self.rank!r}",
                param="/rank",
                code="invalid_option",
            )

    def work(self, data: list[Prompt]) -> int:
        return len(data)

    def run(self, place: FitPlace, data: list[Prompt]) -> Fitted:
        from steer.fit.methods.linear.conceptor import fit_conceptor

        adapter = fit_conceptor(
            place.engine,
            data,
            name=self.name,
            layers=self.layers,
            aperture=self.aperture,
            rank=self.rank,
            max_error=self.max_error,
            site=self.site,
            tokens=self.tokens,
            where=self.where,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        made = adapter.card.provenance
        ranks, errors = made["ranks"], made["errors"]
        assert isinstance(ranks, dict)
        assert isinstance(errors, dict)
        return Fitted(
            {self.name: adapter},
            title=f"{self.name}: what is kept of the conceptor",
            headings=("layer", "directions", "left out"),
            rows=tuple((layer, f"{ranks[layer]}", f"{errors[layer]:.1%}") for layer in ranks),
        )
