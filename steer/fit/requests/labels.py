"""A vector per class, from labelled texts."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from steer.errors import SteerError
from steer.fit.requests.fields import (
    MAX_ITEMS,
    BestField,
    CaptureField,
    DataField,
    HeldOutField,
    SeedField,
    Spelled,
)
from steer.fit.requests.inline import LABELLED, LabelledParam
from steer.fit.requests.request import FitPlace, Fitted, ReadingFields

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.labels import LabelledSet
    from steer.registry.registry import Registry


class LabelsRequest(ReadingFields):
    """What to fit: texts with a label each, as an array or as the text of a JSON lines file."""

    command: ClassVar = "labels"
    summary: ClassVar = "Fit a vector for each label, NAME-LABEL, against all others."
    form: ClassVar = LABELLED
    many: ClassVar = True
    doing: ClassVar = "reading texts"
    batch_size: ClassVar = 32

    texts: (
        Annotated[
            tuple[LabelledParam, ...], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    only: Annotated[
        Annotated[tuple[str, ...], Field(min_length=1, max_length=1024, fail_fast=True)] | None,
        Spelled("names", "Comma-separated labels; by default every one."),
        Field(description="The labels to fit; by default every one."),
    ] = None
    method: Annotated[
        Literal["diffmean", "logistic"],
        Field(description="Difference of means, or logistic regression."),
    ] = "diffmean"
    held_out: HeldOutField = 0.2
    best: BestField = 1
    seed: SeedField = 0

    def check(self, engine: Engine, registry: Registry, data: LabelledSet) -> None:
        from steer.fit.methods.one_vs_rest import check_labels

        try:
            check_labels(data, self.only or data.labels)
        except SteerError as error:
            raise error.at(
                "/only" if self.only else f"/{'data' if self.data else 'texts'}"
            ) from None

    def work(self, data: LabelledSet) -> int:
        from steer.fit.methods.one_vs_rest import split_labels

        return sum(map(len, split_labels(data, self.held_out, self.seed)))

    def run(self, place: FitPlace, data: LabelledSet) -> Fitted:
        from steer.fit.methods.one_vs_rest import fit_labels

        found = fit_labels(
            place.engine,
            data,
            name=self.name,
            labels=self.only,
            method=self.method,
            site=self.site,
            layers=self.layers,
            positions=self.positions,
            where=self.where,
            held_out=self.held_out,
            seed=self.seed,
            best=self.best,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        return Fitted({one.card.name: one for one in found.values()})
