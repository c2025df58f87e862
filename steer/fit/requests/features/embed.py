"""Labels made ready to be found by what they mean."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import BaseModel, ConfigDict

from steer.errors import SteerError
from steer.fit.requests.features.request import SAERequest

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.features.asked.embedder import Embedder
    from steer.fit.measure.answers import Progress
    from steer.registry.features.meanings import NearMeanings
    from steer.registry.registry import Registry

_PROBE = "label"


class EmbeddedLabels(BaseModel):
    """What came of it: how many features have a label, the texts that were `embedded` now, in how
    many `calls`, by which model, as vectors of which width."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: str
    embedder: str
    width: int
    labels: int
    embedded: int
    calls: int


class EmbedRequest(SAERequest):
    """An SAE whose labels an embedder turns into vectors: those that it has not seen before."""

    def check(self, engine: Engine, registry: Registry) -> None:
        self.check_labels(registry)

    def check_labels(self, registry: Registry) -> None:
        """As `check`: no engine is needed. Raises `SteerError` (`no_labels`)."""
        try:
            labels = registry.labels(self.sae)
        except SteerError as error:
            raise error.at("/sae") from None
        registry.meanings.files.check_writable()
        if not len(labels):
            raise SteerError(
                f"the features of {self.sae!r} have no labels: bring some along with `steer sae "
                "labels import`, or make them with `steer sae labels make`",
                code="no_labels",
                param="/sae",
            )

    def run(
        self, registry: Registry, embedder: Embedder, *, progress: Progress | None = None
    ) -> EmbeddedLabels:
        """Embeds what is new, and keeps each piece as it comes; `progress` is told of the labels'
        texts. Raises `SteerError`."""
        from steer.registry.features.meanings import SHARD, EmbedderIdentity

        sae, store = registry.entry("sae", self.sae).sha256, registry.meanings
        labels = registry.labels(self.sae)
        width = embedder.embed([_PROBE]).shape[1]
        identity = EmbedderIdentity(embedder.outside.model, width)
        texts, calls = store.missing(sae, identity, labels), 1
        if progress is not None:
            progress(len(labels) - len(texts))
        for first in range(0, len(texts), SHARD):
            piece = texts[first : first + SHARD]
            store.keep(sae, identity, piece, embedder.embed(piece, progress=progress))
            calls += -(-len(piece) // embedder.batch)
        store.drop_unused(sae, identity, labels)
        return EmbeddedLabels(
            sae=self.sae,
            embedder=identity.model,
            width=width,
            labels=len(labels),
            embedded=len(texts),
            calls=calls,
        )


def search_by_meaning(
    registry: Registry, sae: str, query: str, embedder: Embedder, *, limit: int
) -> NearMeanings:
    """The features of the SAE whose labels are nearest to `query`.

    Raises `SteerError` (`not_embedded` where no label has a vector of this embedder), and what the
    embedder raises.
    """
    from steer.registry.features.meanings import EmbedderIdentity

    labels, entry = registry.labels(sae), registry.entry("sae", sae)
    [row] = embedder.embed([query])
    identity = EmbedderIdentity(embedder.outside.model, len(row))
    found = registry.meanings.nearest(entry.sha256, identity, labels, row, limit=limit)
    if not found.known:
        raise SteerError(
            f"no label of {sae!r} has been embedded by {identity.model!r}: do it once with `steer "
            f"sae labels embed {sae}`, or POST /v1/steering/sae/embeddings",
            code="not_embedded",
        )
    return found
