"""A direction added only where a prompt calls for it (AlphaSteer)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, StrictFloat

from steer.errors import SteerError, pointer
from steer.fit.data.where import WhereName
from steer.fit.methods.linear.reading import TokensRead
from steer.fit.requests.fields import (
    ALL_BY_DEFAULT,
    MAX_ITEMS,
    CaptureField,
    DataField,
    HeldOutField,
    LayerList,
    NameField,
    Ref,
    SeedField,
    Spelled,
)
from steer.fit.requests.inline import LABELLED, LabelledParam
from steer.fit.requests.request import CardFields, FitPlace, Fitted

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.labels import LabelledSet
    from steer.model import HookPoint
    from steer.registry.registry import Registry


class AlphaSteerRequest(CardFields):
    """Texts of two classes or more, the class to steer, and the vector to steer it with."""

    command: ClassVar = "alphasteer"
    summary: ClassVar = "Fit an edit that adds a vector to one class of prompts alone (AlphaSteer)."
    form: ClassVar = LABELLED
    doing: ClassVar = "reading texts"
    batch_size: ClassVar = 16

    name: NameField
    texts: (
        Annotated[
            tuple[LabelledParam, ...], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    vector: Annotated[
        Ref,
        Spelled(flags=("--vector", "-v"), help="A registered vector, or a file: what is added."),
        Field(description="A registered vector: what is added."),
    ]
    steer: Annotated[
        str,
        Field(
            min_length=1,
            max_length=256,
            description="The label of the texts to steer; all others are left alone.",
        ),
    ]
    layers: Annotated[
        LayerList | None,
        ALL_BY_DEFAULT,
        Spelled("layers", "Such as 2-5 or 1,3; by default the vector's."),
        Field(description="The layers to act on; by default the vector's."),
    ] = None
    tokens: Annotated[
        TokensRead,
        Spelled("tokens"),
        Field(
            description="The tokens of a text to steer that are read: all, last, response, or "
            "those of a selection."
        ),
    ] = "last"
    alone_tokens: Annotated[
        TokensRead,
        Spelled("tokens"),
        Field(description="The tokens of a text to leave alone that are read."),
    ] = "all"
    null_share: Annotated[
        tuple[Annotated[StrictFloat, Field(gt=0, le=1)], ...],
        Spelled("numbers"),
        Field(
            min_length=1,
            max_length=1024,
            fail_fast=True,
            description="ρ: the share of directions, those in which the texts left alone have "
            "least, that may be read. One for all layers, or one for each.",
        ),
    ] = (0.5,)
    penalty: Annotated[
        tuple[Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)], ...],
        Spelled("numbers"),
        Field(
            min_length=1,
            max_length=1024,
            fail_fast=True,
            description="λ: the price of what is read. One for all layers, or one for each.",
        ),
    ] = (10.0,)
    where: Annotated[
        WhereName,
        Field(
            description="Where the edit acts unless a request says otherwise: on the last prompt "
            "token, on that and what is generated (onward), on what is generated, or on every "
            "token."
        ),
    ] = "onward"
    held_out: HeldOutField = 0.2
    seed: SeedField = 0

    @property
    def needs_registry(self) -> bool:
        return True

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        for place, layer in enumerate(self.layers or ()):
            yield pointer("layers", place), HookPoint(layer)

    def check(self, engine: Engine, registry: Registry, data: LabelledSet) -> None:
        from steer.fit.methods.linear.alphasteer import by_layer, check_width
        from steer.fit.methods.one_vs_rest import check_labels

        try:
            check_labels(data, [self.steer])
        except SteerError as error:
            raise error.at("/steer") from None
        try:
            vector = registry.vector(self.vector)
            check_width(engine, vector)
        except SteerError as error:
            raise error.at("/vector") from None
        layers = self.layers or vector.card.used_layers
        try:
            for layer in layers:
                vector[layer]
        except SteerError as error:
            raise error.at("/layers") from None
        by_layer(self.null_share, sorted(set(layers)), "null_share")
        by_layer(self.penalty, sorted(set(layers)), "penalty")

    def work(self, data: LabelledSet) -> int:
        from steer.fit.methods.one_vs_rest import split_labels

        return sum(map(len, split_labels(data, self.held_out, self.seed)))

    def run(self, place: FitPlace, data: LabelledSet) -> Fitted:
        from steer.fit.methods.linear.alphasteer import fit_alphasteer

        adapter = fit_alphasteer(
            place.engine,
            data,
            name=self.name,
            vector=place.vector(self.vector),
            steer=self.steer,
            layers=self.layers,
            tokens=self.tokens,
            alone_tokens=self.alone_tokens,
            null_share=self.null_share,
            penalty=self.penalty,
            where=self.where,
            held_out=self.held_out,
            seed=self.seed,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        found = adapter.card.provenance["coefficients"]
        assert isinstance(found, dict)
        return Fitted(
            {self.name: adapter},
            title=f"{self.name}: how much of the vector is added, on texts held out",
            headings=("layer", f"{self.steer}, mean", "last token", "others, rms", "last token"),
            rows=tuple(_row(layer, one) for layer, one in found.items()),
        )


def _row(layer: str, one: object) -> tuple[str, ...]:
    assert isinstance(one, dict)
    order = ("steered_mean", "steered_last_mean", "left_alone_rms", "left_alone_last_rms")
    return (layer, *(f"{one[name]:.3g}" for name in order))
