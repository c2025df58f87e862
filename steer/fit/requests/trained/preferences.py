"""Fields of what is trained on preferences."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, StrictInt

from steer.errors import TooLarge, pointer
from steer.fit.data.preferences import require_answers, sides_needed
from steer.fit.requests.fields import (
    MAX_ITEMS,
    DataField,
    LayerList,
    NameField,
    PlaceField,
    Seed,
    Spelled,
)
from steer.fit.requests.inline import PREFERENCES, PreferenceParam
from steer.fit.requests.request import CardFields, Fitted
from steer.spec import Site

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.engines.base import Engine
    from steer.fit.data.preferences import PreferenceSet
    from steer.model import HookPoint
    from steer.registry.registry import Registry

MAX_BATCH = 32
"""Prompts whose graph a job may hold at once: it shares the memory of the model that serves."""


class PreferenceFields(CardFields):
    """Prompts with an answer to prefer and one to avoid, and how a vector is trained on them."""

    form: ClassVar = PREFERENCES
    doing: ClassVar = "training"
    batch_size: ClassVar = None
    needs_gradients: ClassVar = True
    resumes: ClassVar = True

    loss: str
    name: NameField
    preferences: (
        Annotated[
            tuple[PreferenceParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    layers: Annotated[
        LayerList,
        Spelled("layers", "Such as 2-5 or 1,3."),
        Field(description="The layers to train on."),
    ]
    instruction: Annotated[
        Annotated[str, Field(min_length=1, max_length=4096)] | None,
        Field(
            description="Where answers are missing, the model gives them: the one to prefer with "
            "this instruction, the one to avoid without."
        ),
    ] = None
    place: PlaceField = "system"
    site: Annotated[Site, Field(description="Where in each block it acts.")] = "resid_post"
    steps: Annotated[StrictInt, Field(ge=1, le=1_000_000, description="Training batches.")] = 100
    batch: Annotated[StrictInt, Field(ge=1, le=4096, description="Prompts in one batch.")] = 6
    max_tokens: Annotated[
        StrictInt, Field(ge=1, le=4096, description="The length of an answer the model gives.")
    ] = 48
    seed: Annotated[Seed, Field(description="Draws the start and the batches.")] = 0

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        for place, layer in enumerate(self.layers):
            yield pointer("layers", place), HookPoint(layer, self.site)

    def check(self, engine: Engine, registry: Registry, data: PreferenceSet) -> None:
        require_answers(data, self.instruction, sides_needed(self.loss))
        if self.batch > MAX_BATCH:
            raise TooLarge(
                f"a job trains on at most {MAX_BATCH} prompts at once, beside the requests of "
                f"clients; got {self.batch}: send a smaller batch, or use the command",
                param="/batch",
            )

    def work(self, data: PreferenceSet) -> int:
        return self.steps + sum(data.without(side) for side in sides_needed(self.loss))

    def training(self) -> dict[str, Any]:
        """The fields that every method of this kind takes by its function's name for them."""
        shared = PreferenceFields.model_fields.keys() - {"loss", "preferences", "data"}
        return {name: getattr(self, name) for name in shared}


def told(vector: ControlVector) -> Fitted:
    """A trained vector, with its losses for a person to read."""
    made = vector.card.provenance
    note = f"{made['loss']} loss on {made['preferences']} prompts: {made['loss_before']} → "
    return Fitted({vector.card.name: vector}, (f"{note}{made['loss_after']}",))
