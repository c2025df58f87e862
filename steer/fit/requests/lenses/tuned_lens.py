"""A tuned lens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, StrictFloat, StrictInt

from steer.errors import SteerError, TooLarge
from steer.fit.requests.fields import (
    MAX_ITEMS,
    CaptureField,
    DataField,
    HeldOutField,
    NameField,
    Seed,
)
from steer.fit.requests.inline import PROMPTS
from steer.fit.requests.request import CardFields, FitPlace, Fitted
from steer.prompts import PromptParam

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.registry.registry import Registry


MAX_ROWS = 256
"""Tokens whose distributions a job may train on at once, beside the requests of clients."""


class TunedLensRequest(CardFields):
    """Texts, or prompts to answer, and how the lens is trained."""

    command: ClassVar = "tuned-lens"
    summary: ClassVar = "Fit a tuned lens: for each layer, what it would say in the end."
    form: ClassVar = PROMPTS
    doing: ClassVar = "prompts and steps"
    batch_size: ClassVar = 8
    resumes: ClassVar = True

    name: NameField
    prompts: (
        Annotated[
            tuple[PromptParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    answer_tokens: Annotated[
        StrictInt,
        Field(
            ge=0,
            le=4096,
            description="Let the model answer each prompt with up to so many tokens, and read "
            "these as well.",
        ),
    ] = 0
    held_out: HeldOutField = 0.2
    steps: Annotated[
        StrictInt,
        Field(
            ge=0,
            le=100_000,
            description="Steps of training after the closed form; they need derivatives.",
        ),
    ] = 16
    rows: Annotated[StrictInt, Field(ge=1, le=4096, description="Tokens in one step.")] = 64
    rate: Annotated[
        StrictFloat,
        Field(gt=0, allow_inf_nan=False, description="Adam's learning rate, falling to 0."),
    ] = 3e-4
    seed: Annotated[
        Seed, Field(description="Draws the held-out share, the tokens and the answers.")
    ] = 0

    def check(self, engine: Engine, registry: Registry, data: list[Prompt]) -> None:
        from steer.fit.methods.lenses.tuned_lens import LEAST_PROMPTS, check_engine

        check_engine(engine, self.steps)
        if len(data) < LEAST_PROMPTS:
            raise SteerError(
                f"a lens needs at least {LEAST_PROMPTS} prompts, of a few thousand tokens "
                f"together; got {len(data)}",
                param=self.data_at,
                code="no_prompts",
            )
        if self.rows > MAX_ROWS:
            raise TooLarge(
                f"a job trains on at most {MAX_ROWS} tokens at once, beside the requests of "
                f"clients; got {self.rows}: send fewer, or use the command",
                param="/rows",
            )

    def work(self, data: Any) -> int:
        return len(data) * (2 if self.answer_tokens else 1) + self.steps

    def run(self, place: FitPlace, data: list[Prompt]) -> Fitted:
        from steer.fit.methods.lenses.tuned_lens import fit_tuned_lens

        lens = fit_tuned_lens(
            place.engine,
            data,
            name=self.name,
            answer_tokens=self.answer_tokens,
            held_out=self.held_out,
            steps=self.steps,
            rows=self.rows,
            rate=self.rate,
            seed=self.seed,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        made: dict[str, Any] = lens.card.provenance
        return Fitted(
            {self.name: lens},
            title=f"{self.name}: mean KL on {made['held_out_tokens']} tokens held out, in nats",
            headings=("into block", "logit lens", "tuned lens", "from"),
            rows=tuple(
                (block, f"{one['plain']:.3f}", f"{one['tuned']:.3f}", str(one["from"]))
                for block, one in made["kl"].items()
            ),
        )
