"""Concepts for the objects of a relation."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field, StrictBool, StrictInt

from steer.errors import SteerError
from steer.fit.requests.fields import MAX_ITEMS, DataField, NameField, Seed
from steer.fit.requests.inline import FACTS, FactParam
from steer.fit.requests.request import CardFields, FitPlace, Fitted
from steer.spec import Site

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.relations import RelationTable, Template
    from steer.model import HookPoint
    from steer.registry.registry import Registry

Words = Annotated[str, Field(max_length=4096)]


class LrcRequest(CardFields):
    """The facts of a relation, and the question that asks the model for them."""

    command: ClassVar = "lrc"
    summary: ClassVar = "Fit a concept, NAME-OBJECT, for each object of a relation."
    form: ClassVar = FACTS
    many: ClassVar = True
    doing: ClassVar = "facts and Jacobians"
    batch_size: ClassVar = None
    needs_gradients: ClassVar = True

    name: NameField
    facts: (
        Annotated[tuple[FactParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)]
        | None
    ) = None
    data: DataField = None
    relation: Annotated[Words, Field(description="The relation to fit, as the file names it.")]
    prompt: Annotated[
        Words, Field(description="The question, such as 'What is the capital of {subject}?'.")
    ]
    opening: Annotated[Words, Field(description="How the answer begins, up to the object.")] = ""
    plain: Annotated[
        StrictBool, Field(description="Take the question as a text, not as a chat.")
    ] = False
    shots: Annotated[
        StrictInt, Field(ge=0, le=64, description="Solved examples before the question.")
    ] = 0
    subject_layer: Annotated[
        StrictInt | None, Field(description="By default just before half the depth.")
    ] = None
    object_layer: Annotated[StrictInt | None, Field(description="By default the last but one.")] = (
        None
    )
    site: Annotated[Site, Field(description="Where in its block the subject's state is read.")] = (
        "resid_post"
    )
    rank: Annotated[StrictInt, Field(ge=1, description="Of the inverse.")] = 8
    jacobians: Annotated[StrictInt, Field(ge=1, description="Facts that make the map.")] = 20
    seed: Annotated[Seed, Field(description="Draws the solved examples.")] = 0

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        if self.subject_layer is not None:
            yield "/subject_layer", HookPoint(self.subject_layer, self.site)
        if self.object_layer is not None:
            yield "/object_layer", HookPoint(self.object_layer)

    def check(self, engine: Engine, registry: Registry, data: RelationTable) -> None:
        for at, step in (("/prompt", self.template), ("/relation", lambda: self._facts(data))):
            try:
                step()
            except SteerError as error:
                raise error.at(at) from None

    def template(self) -> Template:
        """The question with its opening; raises `SteerError` where it names no subject."""
        from steer.fit.data.relations import Template

        return Template(self.prompt, self.opening, chat=not self.plain, shots=self.shots)

    def _facts(self, data: RelationTable) -> int:
        return len(data.about(self.relation))

    def work(self, data: RelationTable) -> int:
        return self._facts(data) + min(self.jacobians, self._facts(data))

    def run(self, place: FitPlace, data: RelationTable) -> Fitted:
        from steer.fit.methods.lrc import fit_lrc

        found = fit_lrc(
            place.engine,
            data,
            name=self.name,
            relation=self.relation,
            template=self.template(),
            subject_layer=self.subject_layer,
            object_layer=self.object_layer,
            site=self.site,
            rank=self.rank,
            jacobians=self.jacobians,
            seed=self.seed,
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        made = next(iter(found.values())).card.provenance
        note = (
            f"{len(found)} concepts from {made['answered']} of {made['facts']} facts that the "
            "model knows"
        )
        return Fitted({one.card.name: one for one in found.values()}, (note,))
