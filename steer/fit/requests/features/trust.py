"""How purely features stand for concepts that labelled texts have."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, GetJsonSchemaHandler, StrictInt, field_validator
from pydantic_core import CoreSchema

from steer.fit.requests.features.request import SAERequest
from steer.fit.requests.features.texts import BatchField, PooledField
from steer.fit.requests.fields import MAX_ITEMS, DataField, Seed, data_text
from steer.fit.requests.inline import LABELLED, LabelledParam, count
from steer.spec import exactly_one

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.labels import LabelledSet
    from steer.fit.measure.answers import Progress
    from steer.registry.features.trust import ConceptTrust
    from steer.registry.registry import Registry


class TrustRequest(SAERequest):
    """Texts with a label each, as an array or as the text of a JSON lines file: of each label the
    feature that tells it, and how purely it does."""

    texts: (
        Annotated[
            tuple[LabelledParam, ...], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    pooled: PooledField = "last"
    p: Annotated[
        StrictInt,
        Field(ge=1, le=16, description="Features taken away when it is asked what is lost."),
    ] = 1
    batch: BatchField = 16
    seed: Annotated[Seed, Field(description="Halves the texts.")] = 0

    @field_validator("data", mode="before")
    @classmethod
    def _is_text(cls, value: Any) -> Any:
        return data_text(value, "texts")

    @classmethod
    def __get_pydantic_json_schema__(
        cls, core_schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> dict[str, Any]:
        schema = handler(core_schema)
        handler.resolve_ref_schema(schema).update(exactly_one("texts", "data"))
        return schema

    def taken(self) -> LabelledSet:
        """The labelled texts; raises `SteerError`."""
        return LABELLED.taken(self.texts, self.data)

    def check(self, engine: Engine, registry: Registry) -> None:
        from steer.fit.features.trust import check_classes

        super().check(engine, registry)
        registry.findings.files.check_writable()
        check_classes(self.taken())

    def work(self, registry: Registry) -> int:
        """How many texts `run` will tell `progress` of."""
        from steer.fit.features.trust import measures_absorption

        twice = measures_absorption(registry.sae(self.sae), self.pooled)
        return count(self.texts, self.data) * (2 if twice else 1)

    def run(
        self, engine: Engine, registry: Registry, *, progress: Progress | None = None
    ) -> list[ConceptTrust]:
        """Measures the concepts, and keeps what is found. Raises `SteerError`."""
        from steer.fit.features.trust import concept_trust

        found = concept_trust(
            engine,
            registry.sae(self.sae),
            self.taken(),
            pooled=self.pooled,
            p=self.p,
            seed=self.seed,
            batch=self.batch,
            progress=progress,
        )
        sha256 = registry.entry("sae", self.sae).sha256
        # Of a feature that tells two concepts, the one stays that it fires on, and tells best.
        for one in sorted(found, key=lambda one: (one.present, one.fms)):
            registry.findings.keep(sha256, one)
        return sorted(found, key=lambda one: -one.fms)
