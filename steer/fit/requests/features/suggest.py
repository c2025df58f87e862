"""Features for what a sentence asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, StrictInt

from steer.fit.requests.features.effect import KLField, QuestionsField, asked_questions
from steer.fit.requests.features.request import SAERequest
from steer.fit.requests.fields import (
    ChosenPlaceField,
    MaxTokensField,
    NullsField,
    OppositeField,
    Seed,
    Sentence,
    Spelled,
    TemperatureField,
)

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.fit.features.suggesting import SuggestOptions
    from steer.fit.features.suggestion import Suggestions
    from steer.fit.measure.answers import Progress
    from steer.registry.registry import Registry

QUESTIONS = 24
"""Neutral questions that are asked unless others are given."""


class SuggestRequest(SAERequest):
    """An instruction in words, and how features that do the same are looked for."""

    instruction: Annotated[
        Sentence,
        Spelled(argument=True, help='What the model is told, such as "You are very formal."'),
        Field(description="What the model is told, as one would say it in a prompt."),
    ]
    opposite: OppositeField = None
    place: ChosenPlaceField = None
    candidates: Annotated[
        StrictInt, Field(ge=1, le=64, description="Features that are raised and looked at.")
    ] = 8
    kl: KLField = 0.3
    nulls: NullsField = 10
    prompts: QuestionsField = None
    max_tokens: MaxTokensField = 32
    temperature: TemperatureField = 0.7
    seed: Annotated[Seed, Field(description="Draws the questions, the answers and the nulls.")] = 0

    @property
    def options(self) -> SuggestOptions:
        """The same without the SAE and the questions."""
        from steer.fit.features.suggesting import SuggestOptions

        return SuggestOptions(
            self.instruction,
            self.opposite or "",
            place=self.place,
            candidates=self.candidates,
            kl=self.kl,
            nulls=self.nulls,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
        )

    def asked(self, engine: Engine) -> list[Prompt]:
        """The questions, as chats where the model has a way to write them."""
        return asked_questions(engine, self.prompts, self.seed, QUESTIONS)

    def check(self, engine: Engine, registry: Registry) -> None:
        from steer.errors import SteerError
        from steer.fit.features.contrast import LEAST
        from steer.fit.features.effect import check_raisable

        super().check(engine, registry)
        check_raisable(engine, registry.sae(self.sae), 0)
        count = len(self.asked(engine))
        if count < LEAST:
            raise SteerError(
                f"{count} questions are too few to tell two sets of answers apart: give at least "
                f"{LEAST}",
                code="too_few_texts",
                param="/prompts",
            )

    def work(self, engine: Engine) -> int:
        """The most steps that `run` will tell `progress` of."""
        from steer.fit.features.suggesting import suggest_steps

        return suggest_steps(len(self.asked(engine)), self.options)

    def run(
        self, engine: Engine, registry: Registry, *, progress: Progress | None = None
    ) -> Suggestions:
        """Looks for the features. Raises `SteerError`."""
        from steer.fit.features.suggesting import suggest

        return suggest(
            engine,
            registry.sae(self.sae),
            self.sae,
            self.asked(engine),
            self.options,
            labels=registry.labels(self.sae),
            progress=progress,
        )
