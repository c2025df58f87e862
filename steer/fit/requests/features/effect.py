"""What a feature does to what the model says."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, TypeAlias

from pydantic import Field, StrictFloat, StrictInt

from steer.errors import SteerError
from steer.fit.requests.features.request import SAERequest
from steer.fit.requests.fields import MAX_ITEMS, NullsField, Seed, Spelled
from steer.prompts import PromptParam, as_chat, prompt_of
from steer.spec import Index

if TYPE_CHECKING:
    from steer.artefacts.sae.base import SAE
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.fit.features.effect import EffectOptions
    from steer.fit.measure.answers import Progress
    from steer.registry.features.effect import OutputEffect
    from steer.registry.registry import Registry

QUESTIONS = 8
"""Neutral questions that are asked unless others are given."""

FeaturesField: TypeAlias = Annotated[
    tuple[Index, ...],
    Field(min_length=1, max_length=64, description="The features, by their numbers."),
]
KLField: TypeAlias = Annotated[
    StrictFloat,
    Field(
        gt=0,
        le=5,
        description="How far a feature is raised: the mean KL, in nats, of what the model says "
        "next.",
    ),
]
QuestionsField: TypeAlias = Annotated[
    tuple[PromptParam, ...] | None,
    Spelled(hidden=True),
    Field(
        min_length=1,
        max_length=MAX_ITEMS,
        description="What is asked, texts or lists of messages; by default shipped neutral "
        "questions.",
        fail_fast=True,
    ),
]


def asked_questions(
    engine: Engine, prompts: tuple[PromptParam, ...] | None, seed: int, count: int
) -> list[Prompt]:
    """The questions, as chats where the model has a way to write them: those given, or `count` of
    the shipped ones."""
    from steer.fit.make.questions import neutral_questions, shuffled

    if prompts is None:
        return [as_chat(engine.tokenizer, one) for one in shuffled(neutral_questions(), seed)][
            :count
        ]
    return [as_chat(engine.tokenizer, prompt_of(one)) for one in prompts]


def check_features(sae: SAE, features: tuple[int, ...], field: str = "features") -> None:
    """Raises `SteerError` (`feature_out_of_range`, `no_direction`) at the field."""
    try:
        rows = sae.writes(features)
    except SteerError as error:
        raise error.at(f"/{field}") from None
    for feature, row in zip(features, rows, strict=True):
        if not row.any():
            raise SteerError(
                f"the decoder row of feature {feature} is zero, so it can do nothing: leave the "
                "feature out",
                code="no_direction",
                param=f"/{field}",
            )


class EffectRequest(SAERequest):
    """Features that are raised until what the model says has moved by a given KL, beside
    directions of chance that are raised as far."""

    features: FeaturesField
    kl: KLField = 0.2
    nulls: NullsField = 10
    max_tokens: Annotated[
        StrictInt, Field(ge=1, le=1024, description="The length of an answer.")
    ] = 24
    top: Annotated[StrictInt, Field(ge=1, le=100, description="Promoted tokens to report.")] = 10
    prompts: QuestionsField = None
    seed: Annotated[Seed, Field(description="Draws the questions and the nulls.")] = 0

    @property
    def options(self) -> EffectOptions:
        """The same without what is asked, and of which features."""
        from steer.fit.features.effect import EffectOptions

        return EffectOptions(
            kl=self.kl,
            nulls=self.nulls,
            max_tokens=self.max_tokens,
            top=self.top,
            seed=self.seed,
        )

    def check(self, engine: Engine, registry: Registry) -> None:
        from steer.fit.features.effect import check_raisable

        super().check(engine, registry)
        registry.findings.files.check_writable()
        sae = registry.sae(self.sae)
        check_features(sae, self.features)
        check_raisable(engine, sae, self.features[0])

    def work(self) -> int:
        """How many steps `run` will tell `progress` of."""
        from steer.fit.features.effect import effect_steps

        return effect_steps(len(self.features), self.options)

    def run(
        self, engine: Engine, registry: Registry, *, progress: Progress | None = None
    ) -> list[OutputEffect]:
        """Measures the features, and keeps what is found. Raises `SteerError`."""
        from steer.fit.features.effect import output_effects

        sha256 = registry.entry("sae", self.sae).sha256
        found = output_effects(
            engine,
            registry.sae(self.sae),
            self.features,
            asked_questions(engine, self.prompts, self.seed, QUESTIONS),
            self.options,
            survey=registry.surveys.find(sha256),
            progress=progress,
        )
        for one in found:
            registry.findings.keep(sha256, one)
        return found
