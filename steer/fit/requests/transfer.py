"""A vector of one model for another."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import ConfigDict, Field, StrictFloat

from steer.errors import SteerError, Unsupported
from steer.fit.data.prompt import Positions
from steer.fit.requests.fields import MAX_ITEMS, CaptureField, DataField, Ref, Seed, Spelled
from steer.fit.requests.inline import PROMPTS, DataForm
from steer.fit.requests.request import FitPlace, FitRequest, Fitted
from steer.prompts import PromptParam
from steer.spec import StoredName, check_name

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.registry.registry import Registry

_FORM: DataForm[list[Prompt]] = DataForm(
    PROMPTS.field,
    "JSON lines: prompts both models read.",
    PROMPTS.read,
    PROMPTS.parse,
    PROMPTS.of,
    flags=("--prompts", "-p"),
)


class TransferRequest(FitRequest):
    """Which vector, from which model, and the prompts that both models read.

    A server has one model, so `from` can only name its own there: the command moves vectors between
    two.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    command: ClassVar = "transfer"
    summary: ClassVar = "Move a vector from one model to another, with its error on the card."
    form: ClassVar = _FORM
    batch_size: ClassVar = 16

    vector: Annotated[
        Ref,
        Spelled(argument=True, help="A registered vector, or a file."),
        Field(description="A registered vector."),
    ]
    prompts: (
        Annotated[
            tuple[PromptParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    source: Annotated[
        Ref,
        Spelled(flags=("--from",)),
        Field(alias="from", description="The model the vector was made for."),
    ]
    name: Annotated[
        StoredName | None,
        Spelled(flags=("--name", "-n")),
        Field(description="By default the vector's own."),
    ] = None
    method: Annotated[
        Literal["procrustes", "anchors"],
        Field(description="A rotation and scale, or the vector as a sum of anchors."),
    ] = "procrustes"
    positions: Annotated[
        Positions, Spelled("position"), Field(description="Which token's state is an anchor.")
    ] = "last"
    held_out: Annotated[
        StrictFloat,
        Field(ge=0, le=0.9, description="The share of prompts that only measures."),
    ] = 0.2
    seed: Annotated[Seed, Field(description="Draws the held-out prompts.")] = 0

    @property
    def needs_registry(self) -> bool:
        return True

    @property
    def source_model(self) -> str:
        return self.source

    def check(self, engine: Engine, registry: Registry, data: list[Prompt]) -> None:
        if not engine.info.is_called(self.source):
            raise Unsupported(
                f"this server has one model, {engine.info.name!r}, and a transfer reads the "
                f"prompts with {self.source!r} as well: use 'steer fit transfer' where both can "
                "be loaded, and upload the vector",
                param="/from",
                code="no_second_model",
            )
        try:
            registry.vector(self.vector)
        except SteerError as error:
            raise error.at("/vector") from None

    def work(self, data: list[Prompt]) -> int:
        return 2 * len(data)

    def run(self, place: FitPlace, data: list[Prompt]) -> Fitted:
        from steer.fit.methods.transfer import transfer

        given = place.vector(self.vector)
        name = self.name or check_name(given.card.name)
        moved = transfer(
            place.source or place.engine,
            place.engine,
            given,
            data,
            name=name,
            method=self.method,
            positions=self.positions,
            held_out=self.held_out,
            seed=self.seed,
            batch=self.at_once(place),
            progress=place.progress,
        )
        errors = moved.card.provenance["transfer_error"]
        assert isinstance(errors, dict)
        notes = (f"layer {layer}, on other prompts: {error}" for layer, error in errors.items())
        return Fitted({name: moved}, tuple(notes))
