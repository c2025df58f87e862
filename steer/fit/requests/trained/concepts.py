"""A probe that reads roles and their fillers."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, StrictFloat, StrictInt

from steer.artefacts.concepts.form import DIMENSIONS, LEAST_EXAMPLES
from steer.errors import SteerError
from steer.fit.data.concepts import SaidText
from steer.fit.requests.fields import CaptureField, DataField, LayerList, NameField, Spelled
from steer.fit.requests.inline import SAID
from steer.fit.requests.request import CardFields, FitPlace, Fitted
from steer.prompts.forms import Place

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.concepts import SaidTexts
    from steer.model import HookPoint
    from steer.registry.registry import Registry

MAX_EXAMPLES = 1 << 14


class ConceptsFitRequest(CardFields):
    """Texts with the fillers of their roles, and how the probe is taught."""

    command: ClassVar = "concepts"
    summary: ClassVar = "Fit a probe that reads off states which filler each role has."
    form: ClassVar = SAID
    doing: ClassVar = "texts and steps"
    resumes: ClassVar = True

    name: NameField
    examples: (
        Annotated[
            tuple[SaidText, ...],
            Field(min_length=LEAST_EXAMPLES, max_length=MAX_EXAMPLES, fail_fast=True),
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    layers: Annotated[
        LayerList | None,
        Spelled("layers", "Such as 2-5 or 1,3; by default the upper half."),
        Field(description="The layers that are read together; by default the upper half."),
    ] = None
    position: Annotated[
        Place,
        Spelled("place", "The token that is read: an index, or a piece of each text."),
        Field(
            description="The token that is read: an index, negative from the end, or a piece of "
            "each text."
        ),
    ] = -1
    clusters: Annotated[
        StrictInt, Field(ge=1, le=64, description="Clusters of a token's layers.")
    ] = 5
    dimensions: Annotated[
        StrictInt, Field(ge=256, le=16_384, description="Channels of a code.")
    ] = DIMENSIONS
    held_out: Annotated[
        StrictFloat,
        Field(gt=0, le=0.5, description="The share of the examples that tries the probe."),
    ] = 0.2
    seed: Annotated[
        StrictInt,
        Field(ge=0, lt=1 << 31, description="Draws the held-out share, codes and the start."),
    ] = 0

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.fit.requests.request import site_points

        yield from site_points("resid_post", self.layers)

    def check(self, engine: Engine, registry: Registry, data: SaidTexts) -> None:
        from steer.fit.methods.trained.concepts import check_examples

        del registry
        try:
            check_examples(engine, data, self.held_out, self.dimensions, self.seed)
        except SteerError as error:
            if error.param == "/examples":
                error.param = self.data_at
            raise

    def work(self, data: SaidTexts) -> int:
        from steer.fit.methods.trained.concepts import work_of

        return work_of(len(data))

    def run(self, place: FitPlace, data: SaidTexts) -> Fitted:
        from steer.fit.methods.trained.concepts import fit_concepts

        probe = fit_concepts(
            place.engine,
            data,
            name=self.name,
            layers=self.layers,
            position=self.position,
            clusters=self.clusters,
            dimensions=self.dimensions,
            held_out=self.held_out,
            seed=self.seed,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        found = probe.form.measures
        assert found is not None, "a fit measures"
        return Fitted(
            {self.name: probe},
            title=f"{self.name}: shares right on {found.held_out} texts held out, "
            f"{found.trained} taught, {len(probe.form.fillers)} fillers",
            headings=("role", "pairs", "right", "others' pairs", "commonest filler", "unseen"),
            rows=tuple(
                (
                    one.role,
                    str(one.pairs),
                    *map(_share, (one.accuracy, one.shuffled, one.commonest)),
                    str(one.unseen),
                )
                for one in found.roles
            ),
        )


def _share(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
