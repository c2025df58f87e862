"""Labels made of what a survey saw."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from steer.errors import SteerError
from steer.fit.requests.features.request import SAERequest
from steer.fit.requests.fields import AskLabellerField, Spelled
from steer.spec import Index, StoredName

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.features.labeller import Labeller
    from steer.registry.features.labels import LabelSource
    from steer.registry.registry import Registry

PIECE = 64
"""Labels in a labeller's words that are kept together."""


class LabelRequest(SAERequest):
    """Features of a surveyed SAE that get labels: from their best examples, by themselves, or in
    the words of a labeller."""

    features: Annotated[
        tuple[Index, ...] | None,
        Spelled(hidden=True),
        Field(
            min_length=1,
            max_length=1 << 20,
            fail_fast=True,
            description="The features, by their numbers; by default all that fired.",
        ),
    ] = None
    source: Annotated[
        StoredName | None,
        Field(description="What the labels' source is called; by default how they were made."),
    ] = None

    ask_labeller: AskLabellerField = False

    def check(self, engine: Engine, registry: Registry) -> None:
        self.check_survey(registry)

    def check_labeller(self, registry: Registry, labeller: Labeller) -> None:
        """Raises `SteerError` (`too_many_questions`) before anything is asked or paid for."""
        labeller.check_questions(self.questions(registry), "/features")

    def questions(self, registry: Registry) -> int:
        """The most that a labeller is asked: one for each feature."""
        return registry.sae(self.sae).d_sae if self.features is None else len(self.features)

    def check_survey(self, registry: Registry) -> None:
        """As `check`: no engine is needed, for the survey has read what labels are made of."""
        try:
            sae = registry.sae(self.sae)
            survey = registry.surveys.of(registry.entry("sae", self.sae).sha256, self.sae)
        except SteerError as error:
            raise error.at("/sae") from None
        registry.side_labels.files.check_writable()
        furthest = max(self.features or (0,))
        if furthest >= min(sae.d_sae, survey.card.d_sae):
            raise SteerError(
                f"feature {furthest} is out of range: the SAE {self.sae!r} has features 0 to "
                f"{sae.d_sae - 1}",
                code="feature_out_of_range",
                param="/features",
            )

    def run(self, registry: Registry, labeller: Labeller | None = None) -> LabelSource:
        """Makes the labels and keeps them beside the SAE, a labeller's in pieces as they come.
        Raises `SteerError`."""
        from steer.fit.features.exemplars import exemplar_labels
        from steer.fit.features.labeller import labelled_by

        sha256 = registry.entry("sae", self.sae).sha256
        survey = registry.surveys.of(sha256, self.sae)
        store = registry.side_labels
        if labeller is None:
            found = exemplar_labels(survey, self.features)
            return store.keep(sha256, self.source or "exemplars", "exemplars", found)
        asked = range(survey.card.d_sae) if self.features is None else self.features
        self.check_labeller(registry, labeller)
        name = self.source or "labeller"
        store.check_kind(sha256, name, "labeller")
        for first in range(0, len(asked), PIECE):
            # What has been paid for stays, whatever becomes of the rest.
            found = labelled_by(labeller, survey, asked[first : first + PIECE])
            store.keep(sha256, name, "labeller", found)
        return store.keep(sha256, name, "labeller", {})
