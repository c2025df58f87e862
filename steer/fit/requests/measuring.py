"""What one may ask of measuring: a sweep, a calibration, a comparison."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    model_validator,
)

from steer.fit.data.instruction import Placement
from steer.fit.requests.fields import (
    MAX_ITEMS,
    SCORES,
    SCORES_HERE,
    ExamplesField,
    MaxTokensField,
    NullsField,
    Ref,
    SampleSeedField,
    Score,
    ScoreField,
    Seed,
    Spelled,
    Strengths,
    TemperatureField,
    UsedLayersField,
    UsedWhereField,
    VectorField,
)
from steer.fit.requests.inline import PROMPTS
from steer.prompts import PromptParam, as_chat, prompt_of
from steer.spec import SteeringSpec, exactly_one, parse_spec

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.fit.measure.answers import Progress
    from steer.fit.measure.calibrate import CalibratedVector
    from steer.fit.measure.evaluate import Evaluation, Instruction
    from steer.fit.measure.scoring import AnswerScorer, Scorer
    from steer.fit.measure.sweep import DoseResponse
    from steer.plan.cache import PlanCache
    from steer.plan.plan import SteeringPlan

GROUP = 16
"""Answers between two reports."""

NULLS = 4
"""As `steer.fit.measure.nulls.runs.NULLS`, which needs torch."""


class MeasureRequest(BaseModel):
    """The prompts that are answered, and how."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[
        tuple[PromptParam, ...],
        Spelled(flags=("--prompts", "-p"), help=PROMPTS.line),
        Field(
            min_length=1,
            max_length=MAX_ITEMS,
            description="What is asked: texts, or lists of messages.",
            fail_fast=True,
        ),
    ]
    plain: Annotated[
        StrictBool,
        Field(
            description="Continue texts as they are; else a model with a chat template is asked "
            "them as a user's messages."
        ),
    ] = False
    max_tokens: MaxTokensField = 48
    temperature: TemperatureField = 0.0

    def asked(self, engine: Engine) -> list[Prompt]:
        """The prompts as measuring takes them."""
        return as_asked(engine, self.prompts, plain=self.plain)


def as_asked(engine: Engine, prompts: Sequence[PromptParam], *, plain: bool) -> list[Prompt]:
    """Prompts as the engine is asked them: a model for chats is not given bare texts unless they
    are to be continued (`plain`), which would measure something that no user meets."""
    given = [prompt_of(prompt) for prompt in prompts]
    return given if plain else [as_chat(engine.tokenizer, prompt) for prompt in given]


class SweepRequest(MeasureRequest):
    """Which vector, on which prompts, at which strengths, and what counts.

    `score` is `regex:PATTERN`, `words:a,b,c` or `probe:VECTOR`. `layers` and `where` are the card's
    unless given.
    """

    vector: VectorField
    score: ScoreField
    strengths: Annotated[
        Strengths,
        Spelled("strengths", "Comma-separated, in multiples of the stored vector."),
        Field(description="In multiples of the stored vector."),
    ] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
    layers: UsedLayersField = None
    where: UsedWhereField = None
    seed: SampleSeedField = 0
    examples: ExamplesField = 3

    @model_validator(mode="after")
    def _distinct(self) -> SweepRequest:
        if len(set(self.strengths)) < len(self.strengths):
            raise ValueError("a strength is listed twice")
        return self

    @property
    def answers(self) -> int:
        """Those at every strength, and the unsteered model's."""
        return len(self.prompts) * (1 + len(self.strengths))

    def spec(self, strength: float) -> SteeringSpec:
        """The spec of one dose; raises `SpecError`."""
        item: dict[str, Any] = {"kind": "add", "vector": self.vector, "strength": strength}
        if self.layers is not None:
            item["layers"] = self.layers
        if self.where is not None:
            item["where"] = self.where.model_dump(mode="json", by_alias=True, exclude_none=True)
        return parse_spec({"interventions": [item]})

    def run(
        self,
        engine: Engine,
        plans: PlanCache,
        scorer: AnswerScorer | Scorer,
        *,
        vectors: Mapping[str, ControlVector] | None = None,
        progress: Progress | None = None,
    ) -> DoseResponse:
        """Measures, weakest strength first; `vectors` are those that `plans` cannot find. Raises
        `SteerError`."""
        from steer.engines.base import SamplingParams
        from steer.fit.measure.sweep import dose_response

        return dose_response(
            engine,
            self.asked(engine),
            lambda strength: plans.plan(self.spec(strength), vectors=vectors),
            sorted(self.strengths),
            scorer,
            sampling=SamplingParams(
                max_tokens=self.max_tokens,
                temperature=self.temperature,
                seed=self.seed,
                logprobs=0,
            ),
            examples=self.examples,
            group=GROUP,
            progress=progress,
        )


class CalibrateRequest(MeasureRequest):
    """Which vector, on which prompts, and where its safe range ends.

    Without a `score` (as in a sweep) only KL and perplexity are measured. `layers` and `where` are
    the card's unless given; given, they become its defaults.
    """

    vector: VectorField
    score: Annotated[
        Score | None,
        Spelled(
            flags=("--score", "-s"),
            help=f"{SCORES_HERE} Without it, only KL and perplexity are measured.",
        ),
        Field(description=f"{SCORES} Without it, only KL and perplexity are measured."),
    ] = None
    strengths: Annotated[
        Strengths | None,
        Spelled(
            "strengths", "Comma-separated, above 0; by default 15, up to twice the card's own."
        ),
        Field(description="Above 0; by default 15, up to twice the card's own."),
    ] = None
    layers: UsedLayersField = None
    where: UsedWhereField = None
    max_perplexity_ratio: Annotated[
        StrictFloat,
        Field(
            ge=1,
            allow_inf_nan=False,
            description="The calibrated range ends before the ratio is greater.",
        ),
    ] = 1.5
    min_valid: Annotated[
        StrictFloat, Field(ge=0, le=1, description="And before fewer answers are valid.")
    ] = 0.8
    max_drop: Annotated[
        StrictFloat,
        Field(
            ge=0,
            allow_inf_nan=False,
            description="And before the score falls by more than this.",
        ),
    ] = 0.05
    nulls: NullsField = NULLS
    seed: SampleSeedField = 0

    @property
    def answers(self) -> int:
        """Every answer, every answer read again, and the nulls."""
        from steer.fit.measure.calibrate import steps_of

        nulls = 0 if self.score is None else self.nulls
        return steps_of(self.prompts, self.strengths, nulls=nulls)

    def check(self, engine: Engine, vector: ControlVector) -> None:
        """Raises what is wrong with this use of `vector`, before anything is measured."""
        from steer.fit.measure.calibrate import check_use

        layers = self._layers(vector)
        check_use(engine, vector, strengths=self.strengths, layers=layers, where=self.where)

    def _layers(self, vector: ControlVector) -> tuple[int, ...] | None:
        return vector.card.layers if self.layers == "all" else self.layers

    def run(
        self,
        engine: Engine,
        vector: ControlVector,
        scorer: AnswerScorer | Scorer | None,
        *,
        progress: Progress | None = None,
    ) -> CalibratedVector:
        """Calibrates `vector`. Raises `SteerError`."""
        from steer.artefacts.calibration import SafeLimits
        from steer.fit.measure.calibrate import calibrate

        return calibrate(
            engine,
            vector,
            self.asked(engine),
            scorer,
            scorer_name=self.score,
            strengths=self.strengths,
            layers=self._layers(vector),
            where=self.where,
            limits=SafeLimits(
                perplexity_ratio=self.max_perplexity_ratio,
                valid=self.min_valid,
                drop=self.max_drop,
            ),
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            nulls=self.nulls,
            group=GROUP,
            progress=progress,
        )


class MethodParam(BaseModel):
    """A way to steer under its name in the table: a spec, or a saved profile."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra=exactly_one("steering", "profile")
    )

    name: Annotated[str, Field(min_length=1, max_length=128)]
    steering: dict[str, Any] | None = None
    profile: Ref | None = None

    @model_validator(mode="after")
    def _one(self) -> MethodParam:
        if (self.steering is None) == (self.profile is None):
            raise ValueError("a method is either a spec ('steering') or a 'profile'")
        return self


class EvaluateRequest(MeasureRequest):
    """Which methods, on which prompts, by which score (as in a sweep).

    `instruction` is what the prompt-only baseline is told, such as "Answer in French.".
    """

    methods: Annotated[
        tuple[MethodParam, ...],
        Spelled(hidden=True),
        Field(min_length=1, max_length=32, fail_fast=True, description="What to compare."),
    ]
    score: ScoreField
    instruction: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)],
        Spelled(
            flags=("--instruction", "-i"),
            help="What the prompt-only baseline is told; by default the first vector's card.",
        ),
        Field(description="What the prompt-only baseline is told."),
    ]
    place: Annotated[
        Placement | None,
        Field(
            description="Where it is told: in the system message, after what the user says last, "
            "or before it; by default where the card of a vector from a sentence says, or in the "
            "system message."
        ),
    ] = None
    nulls: NullsField = NULLS
    seed: Annotated[
        Seed, Field(description="Draws the bootstrap, the nulls, and samples above 0.")
    ] = 0
    resamples: Annotated[
        StrictInt, Field(ge=100, le=10_000, description="Of the bootstrap over prompts.")
    ] = 2000
    examples: ExamplesField = 1

    @model_validator(mode="after")
    def _distinct(self) -> EvaluateRequest:
        if len({method.name for method in self.methods}) < len(self.methods):
            raise ValueError("two methods have one name")
        return self

    @property
    def answers(self) -> int:
        """Those of the methods, of the unsteered model, of the one that was told in words, and of
        the nulls."""
        from steer.fit.measure.evaluate import evaluation_steps

        return evaluation_steps(len(self.prompts), len(self.methods), self.nulls)

    def run(
        self,
        engine: Engine,
        plans: Sequence[SteeringPlan],
        scorer: AnswerScorer | Scorer,
        *,
        told: Instruction | None = None,
        progress: Progress | None = None,
    ) -> Evaluation:
        """Compares `plans`, one for each method; `told` says where the instruction comes from.
        Raises `SteerError`."""
        from steer.fit.measure.evaluate import ComparedMethod, Instruction, evaluate

        return evaluate(
            engine,
            self.asked(engine),
            [ComparedMethod(one.name, plan) for one, plan in zip(self.methods, plans, strict=True)],
            scorer,
            instruction=told or Instruction(self.instruction, place=self.place or "system"),
            scorer_name=self.score,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            seed=self.seed,
            nulls=self.nulls,
            resamples=self.resamples,
            examples=self.examples,
            group=GROUP,
            progress=progress,
        )
