"""What texts say of the features of an SAE: surveys, and contrasts of two sets."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool, StrictInt

from steer.fit.requests.features.request import SAERequest
from steer.fit.requests.fields import MAX_ITEMS, ReadWhereField, Seed, Spelled
from steer.fit.requests.request import check_selections
from steer.prompts import PromptParam, as_chat, prompt_of

if TYPE_CHECKING:
    from pathlib import Path

    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.fit.features.contrast import Contrast
    from steer.fit.measure.answers import Progress
    from steer.registry.features.survey import Survey
    from steer.registry.registry import Registry

LINES = "JSON lines: texts, messages, or objects with messages, prompt or text."

PooledField = Annotated[
    Literal["max", "mean", "last"],
    Field(
        description="What stands for a text: a feature's largest activation in it, its mean, or "
        "that on the last token."
    ),
]
BatchField = Annotated[
    StrictInt,
    Field(
        ge=1,
        le=1024,
        description="Texts read at once. Alone (1) a text's states are the same to the bit "
        "every time.",
    ),
]


def _data(description: str, least: int = 1) -> Any:
    """The field of a set of texts."""
    return Field(min_length=least, max_length=MAX_ITEMS, description=description, fail_fast=True)


class FeaturesRequest(SAERequest):
    """An SAE, and how texts are read. `data` names the fields that hold them."""

    data: ClassVar[tuple[str, ...]]

    chat: Annotated[
        StrictBool,
        Field(description="Read texts as a user's message, in the model's chat template."),
    ] = False
    where: ReadWhereField = None
    batch: BatchField = 16

    def check(self, engine: Engine, registry: Registry) -> None:
        super().check(engine, registry)
        check_selections(self, engine)

    def asked(self, engine: Engine, prompts: tuple[PromptParam, ...]) -> list[Prompt]:
        """The texts of a field, as they are read."""
        given = [prompt_of(one) for one in prompts]
        return [as_chat(engine.tokenizer, one) for one in given] if self.chat else given

    @property
    def texts(self) -> int:
        """How many are read."""
        return sum(len(getattr(self, name)) for name in self.data)


class SurveyRequest(FeaturesRequest):
    """Texts on which every feature's firing rate, activations and best examples are counted."""

    data: ClassVar = ("prompts",)

    prompts: Annotated[
        tuple[PromptParam, ...],
        Spelled(argument=True, help=LINES),
        _data("What is read: texts, or lists of messages."),
    ]

    def check(self, engine: Engine, registry: Registry) -> None:
        super().check(engine, registry)
        registry.surveys.check_writable()

    def run(
        self,
        engine: Engine,
        registry: Registry,
        scratch: Path,
        *,
        progress: Progress | None = None,
    ) -> Survey:
        """Makes the survey and keeps it. Raises `SteerError`."""
        from steer.fit.features.surveying import SurveyPlace, survey

        return survey(
            engine,
            registry.sae(self.sae),
            registry.entry("sae", self.sae).sha256,
            self.asked(engine, self.prompts),
            SurveyPlace(registry.surveys, scratch),
            where=self.where,
            batch=self.batch,
            progress=progress,
        )


class ContrastRequest(FeaturesRequest):
    """Two sets of texts or chats, which features are to tell apart."""

    data: ClassVar = ("positive", "negative")

    positive: Annotated[
        tuple[PromptParam, ...],
        Spelled(argument=True, help=f"Those that have it. {LINES} Or, alone, pairs."),
        _data("Those that have what is looked for.", 8),
    ]
    negative: Annotated[
        tuple[PromptParam, ...],
        Spelled(argument=True, help="Those that have not, as alike as may be otherwise."),
        _data("Those that have not.", 8),
    ]
    pooled: PooledField = "max"
    top: Annotated[StrictInt, Field(ge=1, le=1000, description="Features to report.")] = 10
    permutations: Annotated[
        StrictInt,
        Field(ge=99, le=9999, description="Shuffles of the labels that chance is read from."),
    ] = 999
    seed: Annotated[Seed, Field(description="Halves the texts, and shuffles.")] = 0

    def run(
        self, engine: Engine, registry: Registry, *, progress: Progress | None = None
    ) -> Contrast:
        """Ranks the features. Raises `SteerError`."""
        from steer.fit.features.contrast import contrast
        from steer.fit.features.pooling import pooled_activations

        sae = registry.sae(self.sae)
        positive, negative = (
            pooled_activations(
                engine,
                sae,
                self.asked(engine, prompts),
                self.pooled,
                at="mean" if self.where is None else self.where,
                param="/where",
                batch=self.batch,
                progress=progress,
            )
            for prompts in (self.positive, self.negative)
        )
        return contrast(
            positive,
            negative,
            labels=registry.labels(self.sae),
            top=self.top,
            permutations=self.permutations,
            seed=self.seed,
        )
