"""The states of a whole data set, kept in files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
    field_validator,
)

from steer.errors import SteerError, Unsupported, pointer
from steer.fit.requests.fields import (
    MAX_ITEMS,
    DataField,
    LayersField,
    ReadWhereField,
    Seed,
    SiteField,
    Spelled,
    data_text,
)
from steer.fit.requests.inline import GIVEN, TokensParam
from steer.fit.requests.request import site_points
from steer.prompts import PromptParam, as_chat
from steer.spec import Layer, Site, SteeringSpec, exactly_one

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.bulk.capturing import BulkReading, CaptureLimits
    from steer.fit.bulk.card import CaptureCard
    from steer.fit.data.texts import GivenTexts
    from steer.fit.measure.answers import Progress
    from steer.model import HookPoint
    from steer.plan.plan import SteeringPlan

PlanOf: TypeAlias = "Callable[[SteeringSpec], SteeringPlan]"


class PointParam(BaseModel):
    """A hook point."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: Layer
    site: Site = "resid_post"


class StatesRequest(BaseModel):
    """Texts, hook points, and which states are kept of every text."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, json_schema_extra=exactly_one("prompts", "data")
    )

    summary: ClassVar = (
        "Read texts through the model, and keep its states in safetensors files with token ids."
    )
    data_fields: ClassVar = ("prompts", "data")

    prompts: Annotated[
        tuple[PromptParam | TokensParam, ...] | None,
        Field(
            min_length=1,
            max_length=MAX_ITEMS,
            fail_fast=True,
            description="What is read: texts, lists of messages, or token ids.",
        ),
    ] = None
    data: DataField = None
    layers: LayersField = None
    site: SiteField = "resid_post"
    points: Annotated[
        Annotated[tuple[PointParam, ...], Field(min_length=1, max_length=1024, fail_fast=True)]
        | None,
        Spelled("points", "Several sites: such as 3.resid_post,5.mlp_out, in place of --layers."),
        Field(description="Hook points of several sites, in place of 'layers' and 'site'."),
    ] = None
    chat: Annotated[
        StrictBool,
        Spelled(flags=("--chat",)),
        Field(description="Read texts as a user's message, in the model's chat template."),
    ] = False
    answer_tokens: Annotated[
        StrictInt,
        Field(
            ge=0,
            le=4096,
            description="Let the model answer with up to so many tokens, read as well.",
        ),
    ] = 0
    temperature: Annotated[
        StrictFloat, Field(ge=0, le=2, description="Of the answers; 0 is greedy.")
    ] = 1.0
    seed: Annotated[Seed, Field(description="Draws the answers, with each text's number.")] = 0
    steering: Annotated[
        SteeringSpec | None,
        Spelled(hidden=True),
        Field(description="The spec under which texts are read and answered."),
    ] = None
    context: Annotated[
        StrictInt | None,
        Field(ge=2, le=1 << 20, description="Cut texts into pieces of so many tokens."),
    ] = None
    skip: Annotated[
        StrictInt, Field(ge=0, le=1 << 20, description="First tokens that are left out.")
    ] = 0
    stride: Annotated[
        StrictInt, Field(ge=1, le=1 << 20, description="Every so many tokens one is kept.")
    ] = 1
    pooled: Annotated[
        Literal["none", "last", "mean", "max"], Field(description="Make one row of a text.")
    ] = "none"
    where: ReadWhereField = None
    stored: Annotated[
        Literal["float32", "float16", "bfloat16"], Field(description="The type of the file.")
    ] = "float32"
    shard_mib: Annotated[
        StrictInt, Field(ge=1, le=1 << 16, description="The size of a file, in MiB.")
    ] = 256
    batch: Annotated[StrictInt, Field(ge=1, le=1024, description="Texts read at once.")] = 16

    @field_validator("data", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        return data_text(value, "prompts")

    def taken(self) -> GivenTexts:
        """The texts that came with the request; raises `SteerError`."""
        return GIVEN.taken(self.prompts, self.data)

    def hook_points(self, engine: Engine) -> tuple[HookPoint, ...]:
        """What is read, each point once. Raises `SteerError` at the field."""
        from steer.model import HookPoint

        if self.points is not None:
            if self.layers is not None or self.site != "resid_post":
                raise SteerError(
                    "'points' say layers and sites themselves: leave out 'layers' and 'site'",
                    param="/points",
                    code="invalid_option",
                )
            named = [
                (pointer("points", n), HookPoint(one.layer, one.site))
                for n, one in enumerate(self.points)
            ]
        else:
            named = list(site_points(self.site, self.layers))
        for at, point in named:
            engine.info.check_point(point, param=at)
            if point.site not in engine.capabilities.captures:
                offered = ", ".join(engine.capabilities.captures) or "none"
                raise Unsupported(
                    f"the {engine.capabilities.engine} engine reads no states at {point.site}; it "
                    f"reads them at: {offered}",
                    param=at,
                    code="no_captures",
                )
        found = [point for _, point in named]
        if self.points is None and self.layers is None:
            found = [HookPoint(layer, self.site) for layer in range(engine.info.n_layers)]
        return tuple(dict.fromkeys(found))

    def check(self, engine: Engine, plan_of: PlanOf | None = None) -> None:
        """Raises what is wrong, before anything is read; `plan_of` compiles the spec."""
        from steer.engines.selecting import TokenChoice

        self.hook_points(engine)
        if self.context is not None and self.answer_tokens:
            raise SteerError(
                "a piece of a text is not answered: give 'context' or 'answer_tokens', not both",
                param="/context",
                code="invalid_option",
            )
        if self.where is not None:
            TokenChoice.of(engine, self.where, at="/where")
        plan = self._plan(plan_of)
        if plan is not None and plan.gated and self.answer_tokens:
            raise Unsupported(
                "states of answers under a gated spec cannot be read afterwards: leave out 'when' "
                "or 'answer_tokens'",
                param="/steering",
                code="unsupported_gate",
            )

    def run(
        self,
        engine: Engine,
        folder: Path,
        *,
        given: GivenTexts | None = None,
        plan_of: PlanOf | None = None,
        limits: CaptureLimits | None = None,
        counter: Callable[[int, str], Progress | None] = lambda _total, _what: None,
    ) -> CaptureCard:
        """Reads the texts (`given`, or those of the request), and keeps their states in `folder`;
        what was begun there goes on. `counter` is asked for what to tell of texts. Raises
        `SteerError`."""
        from steer.fit.bulk.capturing import NO_LIMITS, capture_to
        from steer.fit.bulk.selected import pieces, selected_tokens, steered_texts

        given = self.taken() if given is None else given
        asked: list[Any] = [
            as_chat(engine.tokenizer, one) if self.chat and isinstance(one, str) else one
            for one in given.texts
        ]
        texts, owners = pieces(engine, asked, self.context)
        selected = None
        if self.where is not None:
            selected = selected_tokens(
                engine, asked, self.where, self.context, answered=self.answer_tokens > 0
            )
        plan = self._plan(plan_of)
        return capture_to(
            engine,
            texts,
            folder,
            self._reading(engine),
            items=[given.items[owner] for owner in owners],
            selected=selected,
            steered=None if plan is None else steered_texts(engine, asked, plan, self.context),
            shard_bytes=self.shard_mib << 20,
            limits=NO_LIMITS if limits is None else limits,
            progress=counter(len(texts), "texts"),
        )

    def _reading(self, engine: Engine) -> BulkReading:
        from steer.fit.bulk.capturing import BulkReading

        return BulkReading(
            self.hook_points(engine),
            pooled=self.pooled,
            stride=self.stride,
            skip=self.skip,
            answer_tokens=self.answer_tokens,
            temperature=self.temperature,
            seed=self.seed,
            batch=self.batch,
            dtype=self.stored,
        )

    def _plan(self, plan_of: PlanOf | None) -> SteeringPlan | None:
        if self.steering is None:
            return None
        assert plan_of is not None, "a spec is compiled by whoever has its artefacts"
        try:
            return plan_of(self.steering)
        except SteerError as error:
            error.param = "/steering" + (error.param or "")
            raise
