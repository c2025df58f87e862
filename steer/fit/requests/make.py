"""A vector from a sentence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from steer.fit.requests.fields import (
    MAX_ITEMS,
    SCORES,
    SCORES_HERE,
    ChosenPlaceField,
    DescriptionField,
    LicenceField,
    MaxTokensField,
    NullsField,
    OppositeField,
    Seed,
    Sentence,
    SiteField,
    Spelled,
    TemperatureField,
)
from steer.prompts import PromptParam, as_chat, prompt_of
from steer.spec import StoredName

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.fit.make.made import Made
    from steer.fit.make.wish import Wish
    from steer.fit.measure.answers import Progress
    from steer.fit.measure.scoring import AnswerScorer, Scorer


class MakeRequest(BaseModel):
    """An instruction in words, and how a vector that does the same is made.

    Without `prompts` the neutral questions that ship with Steer are asked; without a `score` an
    answer counts by how much likelier the instruction makes it.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    instruction: Annotated[
        Sentence,
        Spelled(argument=True, help='What the model is told, such as "You are extremely formal."'),
        Field(description="What the model is told, as one would say it in a prompt."),
    ]
    name: Annotated[
        StoredName,
        Spelled(flags=("--name", "-n")),
        Field(description="The name to register the vector under."),
    ]
    opposite: OppositeField = None
    place: ChosenPlaceField = None
    prompts: Annotated[
        tuple[PromptParam, ...] | None,
        Spelled(hidden=True),
        Field(
            min_length=24,
            max_length=MAX_ITEMS,
            description="What is asked, texts or lists of messages; by default the shipped "
            "questions.",
            fail_fast=True,
        ),
    ] = None
    score: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)] | None,
        Spelled(
            flags=("--score", "-s"),
            help=f"{SCORES_HERE} By default how much likelier the instruction makes the answer.",
        ),
        Field(
            description=f"{SCORES} By default how much likelier the instruction makes the answer."
        ),
    ] = None
    method: Annotated[
        Literal["diffmean", "logistic"],
        Field(description="Difference of means, or logistic regression."),
    ] = "diffmean"
    site: SiteField = "resid_post"
    nulls: NullsField = 7
    max_tokens: MaxTokensField = 32
    temperature: TemperatureField = 0.7
    seed: Annotated[
        Seed, Field(description="Parts the questions, and draws answers and nulls.")
    ] = 0
    description: DescriptionField = ""
    licence: LicenceField = ""

    @property
    def wish(self) -> Wish:
        """The same without what is asked and what counts."""
        from steer.fit.make.wish import Wish

        return Wish(
            self.instruction,
            self.name,
            opposite=self.opposite or "",
            place=self.place,
            method=self.method,
            site=self.site,
            nulls=self.nulls,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            description=self.description,
            licence=self.licence,
        )

    def asked(self, engine: Engine) -> list[Prompt]:
        """The questions, as chats where the model has a way to write them."""
        from steer.fit.make.questions import neutral_questions

        prompts = neutral_questions() if self.prompts is None else map(prompt_of, self.prompts)
        return [as_chat(engine.tokenizer, one) for one in prompts]

    def check(self, engine: Engine) -> None:
        """Raises what is wrong, before anything is asked."""
        from steer.fit.make.wish import QuestionParts
        from steer.model import HookPoint

        QuestionParts.of(self.asked(engine), self.seed)
        engine.info.check_point(HookPoint(0, self.site), param="/site")

    def work(self, engine: Engine) -> int:
        """How many steps `run` will tell `progress` of."""
        from steer.fit.make.making import work_of

        return work_of(self.wish, len(self.asked(engine)), engine.info.n_layers)

    def run(
        self,
        engine: Engine,
        scorer: AnswerScorer | Scorer | None,
        *,
        progress: Progress | None = None,
    ) -> Made:
        """Makes the vector. Raises `SteerError`."""
        from steer.fit.make.making import make

        return make(
            engine,
            self.wish,
            self.asked(engine),
            scorer=scorer,
            scorer_name=self.score,
            progress=progress,
        )
