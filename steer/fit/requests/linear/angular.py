"""The plane in which states are turned (Angular Steering)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from steer.fit.data.where import WhereName
from steer.fit.requests.fields import MAX_ITEMS, CaptureField, DataField, HeldOutField, SeedField
from steer.fit.requests.inline import PAIRS, PairParam
from steer.fit.requests.request import FitPlace, Fitted, ReadingFields

if TYPE_CHECKING:
    from steer.fit.data.pairs import PairSet


class AngularRequest(ReadingFields):
    """Contrastive prompts; the layers are the candidates, and where the plane is the same."""

    command: ClassVar = "angular"
    summary: ClassVar = "Fit the plane in which states are turned, NAME and NAME-toward (angular)."
    form: ClassVar = PAIRS
    many: ClassVar = True
    doing: ClassVar = "reading pairs"

    pairs: (
        Annotated[tuple[PairParam, ...], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    where: Annotated[
        WhereName,
        Field(
            description="Where states are turned unless a request says otherwise: on the last "
            "prompt token, on that and what is generated (onward), on what is generated, or on "
            "every token."
        ),
    ] = "all"
    held_out: HeldOutField = 0.2
    seed: SeedField = 0

    def work(self, data: PairSet) -> int:
        from steer.fit.methods.fitting import split_pairs

        split = split_pairs(data.items, self.held_out, self.seed)
        return len(split.fitted) + len(split.measured)

    def run(self, place: FitPlace, data: PairSet) -> Fitted:
        from steer.fit.methods.linear.angular import fit_angular

        axes = fit_angular(
            place.engine,
            data,
            name=self.name,
            site=self.site,
            layers=self.layers,
            positions=self.positions,
            where=self.where,
            held_out=self.held_out,
            seed=self.seed,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        best = axes[0].card.provenance["best_layer"]
        names = [one.card.name for one in axes]
        note = (
            f"the difference on layer {best} is the first axis: turn with 'rotate', vector "
            f"{names[0]!r}, toward {names[1]!r}, mode 'to'"
        )
        return Fitted({one.card.name: one for one in axes}, (note,))
