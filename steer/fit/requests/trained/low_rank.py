"""A trained adapter (LoReFT)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, StrictFloat, StrictInt

from steer.errors import SteerError, TooLarge, pointer
from steer.fit.data.where import WhereName
from steer.fit.requests.fields import MAX_ITEMS, DataField, LayerList, NameField, Seed, Spelled
from steer.fit.requests.inline import EXERCISES, ExerciseParam
from steer.fit.requests.request import CardFields, FitPlace, Fitted
from steer.spec import Site

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.exercises import ExerciseSet
    from steer.model import HookPoint
    from steer.registry.registry import Registry


MAX_BATCH = 64
"""Exercises whose graph a job may hold at once: it shares the memory of the model that serves."""


class LowRankRequest(CardFields):
    """Prompts with the answers to learn, and how the adapter is trained."""

    command: ClassVar = "low-rank"
    summary: ClassVar = "Train a low-rank adapter (LoReFT) on prompts and answers."
    form: ClassVar = EXERCISES
    doing: ClassVar = "training"
    batch_size: ClassVar = None
    needs_gradients: ClassVar = True
    resumes: ClassVar = True

    name: NameField
    exercises: (
        Annotated[
            tuple[ExerciseParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    layers: Annotated[
        LayerList,
        Spelled("layers", "Such as 2-5 or 1,3."),
        Field(description="The layers to train on."),
    ]
    rank: Annotated[StrictInt, Field(ge=1, description="Of the adapter.")] = 4
    site: Annotated[Site, Field(description="Where in each block it acts.")] = "resid_post"
    where: Annotated[
        WhereName,
        Field(
            description="On the last prompt token, on that and the answer (onward), on the answer, "
            "or on all tokens."
        ),
    ] = "last"
    steps: Annotated[StrictInt, Field(ge=1, le=1_000_000, description="Training batches.")] = 200
    batch: Annotated[
        StrictInt, Field(ge=1, le=4096, description="Prompts or pairs in one batch.")
    ] = 8
    rate: Annotated[
        StrictFloat,
        Field(
            gt=0,
            allow_inf_nan=False,
            description="Adam's learning rate, falling to 0.",
        ),
    ] = 4e-3
    seed: Annotated[Seed, Field(description="Draws the start and the batches.")] = 0

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        for place, layer in enumerate(self.layers):
            yield pointer("layers", place), HookPoint(layer, self.site)

    def check(self, engine: Engine, registry: Registry, data: ExerciseSet) -> None:
        width = engine.info.width(self.site)
        if self.rank > width:
            raise SteerError(
                f"a rank must be from 1 to the width, {width}; got {self.rank!r}",
                param="/rank",
                code="invalid_option",
            )
        if self.batch > MAX_BATCH:
            raise TooLarge(
                f"a job trains on at most {MAX_BATCH} exercises at once, beside the requests of "
                f"clients; got {self.batch}: send a smaller batch, or use the command",
                param="/batch",
            )

    def work(self, data: Any) -> int:
        return self.steps

    def run(self, place: FitPlace, data: ExerciseSet) -> Fitted:
        from steer.fit.methods.trained.low_rank import fit_low_rank

        adapter = fit_low_rank(
            place.engine,
            data,
            name=self.name,
            layers=self.layers,
            rank=self.rank,
            site=self.site,
            where=self.where,
            steps=self.steps,
            batch=self.batch,
            rate=self.rate,
            seed=self.seed,
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        made = adapter.card.provenance
        note = f"loss of the answers: {made['loss_before']} → {made['loss_after']} nats per token"
        return Fitted({self.name: adapter}, (note,))
