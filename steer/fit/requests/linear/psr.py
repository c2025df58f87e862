"""What a system prompt does, as an edit that reads the state (PSR)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, StrictFloat, StrictInt

from steer.errors import pointer
from steer.fit.data.where import WhereName
from steer.fit.requests.fields import (
    MAX_ITEMS,
    CaptureField,
    DataField,
    HeldOutField,
    LayerList,
    NameField,
    PlaceField,
    Seed,
    Spelled,
)
from steer.fit.requests.inline import PREFERENCES, PreferenceParam
from steer.fit.requests.request import CardFields, FitPlace, Fitted
from steer.spec import Site

if TYPE_CHECKING:
    from steer.fit.data.preferences import PreferenceSet
    from steer.model import HookPoint


class PsrRequest(CardFields):
    """An instruction, prompts to follow it on, and the layers to fit one after the other."""

    command: ClassVar = "psr"
    summary: ClassVar = "Fit an edit that does to the states what an instruction does (PSR)."
    form: ClassVar = PREFERENCES
    batch_size: ClassVar = 8

    name: NameField
    preferences: (
        Annotated[
            tuple[PreferenceParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    instruction: Annotated[
        str,
        Field(
            min_length=1,
            max_length=4096,
            description="What the edit is to do, as the system message says it. Where a prompt has "
            "no answer to prefer, the model gives it under this.",
        ),
    ]
    layers: Annotated[
        LayerList,
        Spelled("layers", "Such as 14 or 12-18: each is fitted after those before it."),
        Field(description="The layers, each fitted with the edits of those before it on."),
    ]
    place: PlaceField = "system"
    site: Annotated[Site, Field(description="Where in each block it acts.")] = "resid_post"
    where: Annotated[
        WhereName,
        Field(
            description="On the last prompt token, on that and the answer (onward), on the answer, "
            "or on all tokens."
        ),
    ] = "onward"
    penalty: Annotated[
        StrictFloat,
        Field(gt=0, allow_inf_nan=False, description="The price of what is read (ridge)."),
    ] = 1.0
    max_tokens: Annotated[
        StrictInt, Field(ge=1, le=4096, description="The length of an answer the model gives.")
    ] = 48
    temperature: Annotated[
        StrictFloat, Field(ge=0, le=2, description="Of answers the model gives; 0 is greedy.")
    ] = 1.0
    sample: Annotated[
        StrictInt, Field(ge=16, le=1 << 17, description="The most tokens kept of all answers.")
    ] = 8192
    held_out: HeldOutField = 0.2
    seed: Annotated[Seed, Field(description="Draws answers, sample and held-out share.")] = 0

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        for place, layer in enumerate(self.layers):
            yield pointer("layers", place), HookPoint(layer, self.site)

    def work(self, data: PreferenceSet) -> int:
        from steer.fit.methods.card import split

        rows = sum(map(len, split(range(len(data)), self.held_out, self.seed)))
        return data.without("chosen") + rows * len(set(self.layers))

    def run(self, place: FitPlace, data: PreferenceSet) -> Fitted:
        from steer.fit.methods.linear.psr import fit_psr

        adapter = fit_psr(
            place.engine,
            data,
            name=self.name,
            instruction=self.instruction,
            place=self.place,
            layers=self.layers,
            site=self.site,
            where=self.where,
            penalty=self.penalty,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            sample=self.sample,
            held_out=self.held_out,
            seed=self.seed,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        found = adapter.card.provenance["shifts"]
        assert isinstance(found, dict)
        return Fitted(
            {self.name: adapter},
            title=f"{self.name}: what the instruction does to states, on answers held out",
            headings=("layer", "along z", "unexplained", "by their mean"),
            rows=tuple(_row(layer, one) for layer, one in found.items()),
        )


def _row(layer: str, one: object) -> tuple[str, ...]:
    assert isinstance(one, dict)
    order = ("shift_along", "unexplained", "unexplained_by_mean")
    return (layer, *(f"{one[name]:.3g}" for name in order))
