"""A vector trained on preferences, to be added or removed (RePS)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictFloat

from steer.fit.data.where import WhereName
from steer.fit.requests.fields import Spelled
from steer.fit.requests.request import FitPlace, Fitted
from steer.fit.requests.trained.preferences import PreferenceFields, told

if TYPE_CHECKING:
    from steer.fit.data.preferences import PreferenceSet


class RepsRequest(PreferenceFields):
    """Prompts with an answer to prefer and one to avoid, and how the vector is trained."""

    command: ClassVar = "reps"
    summary: ClassVar = "Train a vector on preferred answers, to add or remove (RePS)."

    loss: Annotated[
        Literal["reps", "simpo", "lm"],
        Field(
            description="Preference with suppression beside it, SimPO, or the plain likelihood of "
            "the answers to prefer."
        ),
    ] = "reps"
    factors: Annotated[
        tuple[Annotated[StrictFloat, Field(gt=0, allow_inf_nan=False)], ...],
        Spelled("numbers"),
        Field(
            min_length=1,
            max_length=64,
            description="What the vector is multiplied by while it is trained, one for each batch; "
            "their mean becomes strength 1.",
        ),
    ] = (2.0, 4.0, 6.0, 8.0, 10.0, 12.0, 14.0, 16.0, 18.0, 20.0)
    where: Annotated[
        WhereName,
        Field(
            description="On the last prompt token, on that and the answer (onward), on the answer, "
            "or on all tokens."
        ),
    ] = "all"
    rate: Annotated[
        StrictFloat,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="What AdamW's first step changes at strength 1, as a share of the states' "
            "length; falls to 0.",
        ),
    ] = 0.03

    def run(self, place: FitPlace, data: PreferenceSet) -> Fitted:
        from steer.fit.methods.trained.reps import fit_reps

        vector = fit_reps(
            place.engine,
            data,
            loss=self.loss,
            factors=self.factors,
            where=self.where,
            rate=self.rate,
            progress=place.progress,
            **self.training(),
        )
        return told(vector)
