"""The vector between two prompts' states."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar

from pydantic import Field

from steer.fit.requests.fields import Spelled
from steer.fit.requests.request import FitPlace, Fitted, ReadingFields
from steer.prompts import PromptParam, prompt_of
from steer.spec import StoredName


class TwoPromptsRequest(ReadingFields):
    """The prompt to lead to, and the one to lead away from."""

    command: ClassVar = "prompts"
    summary: ClassVar = "Fit the vector between two prompts' states."
    batch_size: ClassVar = None

    name: Annotated[
        StoredName,
        Spelled(argument=True, help="The vector's name."),
        Field(description="The name to register the vector under."),
    ]
    toward: Annotated[
        PromptParam,
        Spelled("prompt", "The prompt to lead to: a text, or JSON messages."),
        Field(description="The prompt to lead to."),
    ]
    away: Annotated[
        PromptParam,
        Spelled("prompt", "The prompt to lead away from."),
        Field(description="The prompt to lead away from."),
    ]

    def work(self, data: Any) -> int:
        return 2

    def run(self, place: FitPlace, data: Any) -> Fitted:
        from steer.fit.methods.two_prompts import fit_two_prompts

        vector = fit_two_prompts(
            place.engine,
            name=self.name,
            toward=prompt_of(self.toward),
            away=prompt_of(self.away),
            site=self.site,
            layers=self.layers,
            positions=self.positions,
            where=self.where,
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        return Fitted({self.name: vector})
