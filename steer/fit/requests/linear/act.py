"""A map of each channel by itself (Linear-AcT and Mean-AcT)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictBool

from steer.fit.data.prompt import Positions
from steer.fit.data.where import WhereName
from steer.fit.requests.fields import MAX_ITEMS, CaptureField, DataField, LayerList, Spelled
from steer.fit.requests.inline import PAIRS, PairParam
from steer.fit.requests.request import FitPlace, Fitted, ReadingFields

if TYPE_CHECKING:
    from steer.fit.data.pairs import PairSet


class ActRequest(ReadingFields):
    """Contrastive prompts, and how the channels of the negative ones are moved."""

    command: ClassVar = "act"
    summary: ClassVar = "Fit a map of each channel by itself, layer by layer (Linear-AcT)."
    form: ClassVar = PAIRS
    doing: ClassVar = "reading pairs"

    pairs: (
        Annotated[tuple[PairParam, ...], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    layers: Annotated[
        LayerList,
        Spelled("layers", "Such as 2-5 or 1,3: each is fitted after those before it."),
        Field(description="The layers, each fitted with the edits of those before it on."),
    ]
    transport: Annotated[
        Literal["linear", "mean"],
        Field(description="A line for each channel, or its mean alone, which is a vector to add."),
    ] = "linear"
    support: Annotated[
        StrictBool,
        Spelled(flags=("--support/--no-support",)),
        Field(description="Move a channel only where its value is one that negative prompts have."),
    ] = True
    positions: Annotated[
        Positions,
        Spelled("position"),
        Field(
            description="Read the mean over all tokens but the first, the last, that over the "
            "response, the subject's last token, or an index."
        ),
    ] = "mean"
    where: Annotated[
        WhereName,
        Field(
            description="Where the map acts unless a request says otherwise: on the last prompt "
            "token, on that and what is generated (onward), on what is generated, or on every "
            "token."
        ),
    ] = "all"

    def work(self, data: PairSet) -> int:
        return len(data) * len(set(self.layers))

    def run(self, place: FitPlace, data: PairSet) -> Fitted:
        from steer.fit.methods.linear.act import fit_act

        found = fit_act(
            place.engine,
            data,
            name=self.name,
            transport=self.transport,
            support=self.support,
            site=self.site,
            layers=self.layers,
            positions=self.positions,
            where=self.where,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        return Fitted({self.name: found})
