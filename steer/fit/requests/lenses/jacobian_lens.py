"""A Jacobian lens."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, StrictInt

from steer.errors import TooLarge
from steer.fit.requests.fields import (
    ALL_BY_DEFAULT,
    MAX_ITEMS,
    DataField,
    HeldOutField,
    LayerList,
    NameField,
    Seed,
    Spelled,
)
from steer.fit.requests.inline import PROMPTS
from steer.fit.requests.request import CardFields, FitPlace, Fitted
from steer.prompts import PromptParam

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.registry.registry import Registry

MAX_TOKENS = 512
"""Tokens of a text that a job may differentiate at once, beside the requests of clients."""


class JacobianLensRequest(CardFields):
    """Texts, and over how many of them each derivative is averaged."""

    command: ClassVar = "jacobian-lens"
    summary: ClassVar = "Fit a Jacobian lens: what each layer makes the model disposed to say."
    form: ClassVar = PROMPTS
    doing: ClassVar = "hundredths of the rows"
    batch_size: ClassVar = 4
    needs_gradients: ClassVar = True
    resumes: ClassVar = True

    name: NameField
    prompts: (
        Annotated[
            tuple[PromptParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    layers: Annotated[
        LayerList | None,
        ALL_BY_DEFAULT,
        Spelled("layers", "Such as 2-5 or 1,3; by default all, and the embeddings."),
        Field(
            description="The layers whose outputs the lens reads, each but the last; by default "
            "all, and the embeddings."
        ),
    ] = None
    average: Annotated[
        StrictInt,
        Field(
            ge=1,
            le=MAX_ITEMS,
            description="Texts that each row of the matrices is averaged over, or all where there "
            "are fewer; the time goes with it.",
        ),
    ] = 8
    tokens: Annotated[
        StrictInt, Field(ge=2, le=4096, description="Tokens read of each text, from its start.")
    ] = 128
    skip: Annotated[
        StrictInt,
        Field(ge=0, le=4096, description="Tokens at the start of a text that do not count."),
    ] = 16
    held_out: HeldOutField = 0.2
    seed: Annotated[
        Seed, Field(description="Draws the held-out share, and which text has which rows.")
    ] = 0

    def check(self, engine: Engine, registry: Registry, data: list[Prompt]) -> None:
        from steer.fit.methods.lenses.jacobian import blocks_read, check_engine

        del registry, data
        check_engine(engine)
        blocks_read(engine.info, self.layers)
        if self.tokens > MAX_TOKENS:
            raise TooLarge(
                f"a job differentiates at most {MAX_TOKENS} tokens of a text at once, beside the "
                f"requests of clients; got {self.tokens}: send fewer, or use the command",
                param="/tokens",
            )

    def work(self, data: Any) -> int:
        from steer.fit.methods.lenses.jacobian import PARTS

        del data
        return PARTS

    def run(self, place: FitPlace, data: list[Prompt]) -> Fitted:
        from steer.fit.methods.lenses.jacobian import fit_jacobian_lens

        lens = fit_jacobian_lens(
            place.engine,
            data,
            name=self.name,
            average=self.average,
            tokens=self.tokens,
            skip=self.skip,
            held_out=self.held_out,
            seed=self.seed,
            layers=self.layers,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        made: dict[str, Any] = lens.card.provenance
        return Fitted(
            {self.name: lens},
            title=f"{self.name}: mean KL on {made['held_out_tokens']} tokens held out, in nats; "
            f"each row over {made['average']} of {made['prompts']} texts",
            headings=("into block", "logit lens", "Jacobian lens"),
            rows=tuple(
                (block, f"{one['plain']:.3f}", f"{one['jacobian']:.3f}")
                for block, one in made["kl"].items()
            ),
        )
