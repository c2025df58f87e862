"""A vector on the first and last tokens of a prompt, trained with its strength (PrOSV)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, StrictFloat, StrictInt

from steer.errors import SteerError
from steer.fit.requests.request import FitPlace, Fitted
from steer.fit.requests.trained.preferences import PreferenceFields, told

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.preferences import PreferenceSet
    from steer.registry.registry import Registry


class ProsvRequest(PreferenceFields):
    """Prompts with an answer to prefer and one to avoid, and which tokens the vector acts on."""

    command: ClassVar = "prosv"
    summary: ClassVar = "Train a vector for a few tokens of the prompt, with its strength (PrOSV)."

    loss: Annotated[
        Literal["simpo", "lm"],
        Field(description="SimPO, or the plain likelihood of the answers to prefer."),
    ] = "simpo"
    first: Annotated[
        StrictInt, Field(ge=0, le=4096, description="How many first tokens of a prompt it acts on.")
    ] = 4
    last: Annotated[
        StrictInt, Field(ge=0, le=4096, description="How many last tokens of a prompt it acts on.")
    ] = 4
    beta: Annotated[
        StrictFloat,
        Field(gt=0, allow_inf_nan=False, description="β: the factor starts at β√width."),
    ] = 1.0
    spread: Annotated[
        StrictFloat,
        Field(gt=0, allow_inf_nan=False, description="λ: the vector starts with length near √λ."),
    ] = 1.0
    rate: Annotated[
        StrictFloat,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="AdamW's learning rate, as a share of the start, falling to 0.",
        ),
    ] = 0.05

    def check(self, engine: Engine, registry: Registry, data: PreferenceSet) -> None:
        from steer.fit.methods.trained.prosv import prompt_ends

        super().check(engine, registry, data)
        try:
            prompt_ends(self.first, self.last)
        except SteerError as error:
            raise error.at("/last") from None

    def run(self, place: FitPlace, data: PreferenceSet) -> Fitted:
        from steer.fit.methods.trained.prosv import fit_prosv

        vector = fit_prosv(
            place.engine,
            data,
            loss=self.loss,
            first=self.first,
            last=self.last,
            beta=self.beta,
            spread=self.spread,
            rate=self.rate,
            progress=place.progress,
            **self.training(),
        )
        return told(vector)
