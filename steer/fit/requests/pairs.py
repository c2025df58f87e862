"""A vector from contrastive prompts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field, StrictBool

from steer.errors import SteerError, Unsupported
from steer.fit.data.where import WhereName
from steer.fit.requests.fields import (
    MAX_ITEMS,
    BestField,
    CaptureField,
    DataField,
    HeldOutField,
    RefineParam,
    SeedField,
    Spelled,
)
from steer.fit.requests.inline import PAIRS, PairParam
from steer.fit.requests.request import FitPlace, Fitted, ReadingFields

if TYPE_CHECKING:
    from steer.artefacts.control_vector import ControlVector
    from steer.engines.base import Engine
    from steer.fit.data.pairs import PairSet
    from steer.registry.registry import Registry


class PairsRequest(ReadingFields):
    """What to fit: pairs as an array, or as the text of a JSON lines file in `data`."""

    command: ClassVar = "pairs"
    summary: ClassVar = "Fit a control vector from contrastive prompts."
    form: ClassVar = PAIRS
    doing: ClassVar = "reading pairs"

    pairs: (
        Annotated[tuple[PairParam, ...], Field(min_length=2, max_length=MAX_ITEMS, fail_fast=True)]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    method: Annotated[
        Literal["diffmean", "pca", "logistic"],
        Field(
            description="Difference of means, uncentred PCA of the differences, or logistic "
            "regression."
        ),
    ] = "diffmean"
    refine: Annotated[
        RefineParam | None,
        Spelled("sae", "Fit among the latents of this registered SAE (not logistic)."),
        Field(description="Fit among the latents of a registered SAE (not logistic)."),
    ] = None
    held_out: HeldOutField = 0.2
    where: Annotated[
        WhereName | None,
        Field(
            description="Where the vector acts unless a request says otherwise: last, onward, "
            "generation or all. By default what works best, or by separation the last prompt token."
        ),
    ] = None  # type: ignore[assignment]
    choose: Annotated[
        Literal["effect", "separation"] | None,
        Field(
            description="How the default layers, tokens and strength are chosen: by what answers "
            "to held-out prompts do (where a model answers both prompts of a pair alike, as with "
            "the other), or by how well the layers tell the pairs apart, the default with 'best'."
        ),
    ] = None
    best: Annotated[
        BestField | None,
        Field(description="How many of the best layers by separation become the default."),
    ] = None
    seed: SeedField = 0
    beside: Annotated[
        StrictBool,
        Spelled(flags=("--beside/--no-beside",)),
        Field(description="Note the cosine to the registry's vectors for this model."),
    ] = False

    @property
    def needs_registry(self) -> bool:
        return self.beside or self.refine is not None

    def check(self, engine: Engine, registry: Registry, data: Any) -> None:
        if self.states is not None and self.by_effect:
            raise Unsupported(
                "the model does not run where its states are given, and 'effect' needs its "
                "answers: choose by 'separation', or leave out 'states'",
                param="/choose",
                code="no_model",
            )
        if self.refine is not None:
            try:
                registry.sae(self.refine.sae)
            except SteerError as error:
                raise error.at("/refine/sae") from None

    def work(self, data: PairSet) -> int:
        """For a model of many layers; `run` tells of the rest at the end."""
        from steer.fit.make.for_pairs import most_steps
        from steer.fit.methods.fitting import split_pairs

        split = split_pairs(data.items, self.held_out, self.seed)
        choosing = most_steps(len(split.measured)) if self.by_effect else 0
        return len(split.fitted) + len(split.measured) + choosing

    @property
    def by_effect(self) -> bool:
        """Whether the default use is chosen by what the answers do."""
        return (self.choose or ("separation" if self.best else "effect")) == "effect"

    def run(self, place: FitPlace, data: PairSet) -> Fitted:
        from steer.fit.make.for_pairs import choose_for_pairs
        from steer.fit.methods.fitting import fit, split_pairs

        vector = fit(
            place.engine,
            data,
            name=self.name,
            method=self.method,
            refine=None if self.refine is None else {"sae": self.refine.sae},
            library=place.registry,
            site=self.site,
            layers=self.layers,
            positions=self.positions,
            where=self.where,
            held_out=self.held_out,
            seed=self.seed,
            best=self.best,
            batch=self.at_once(place),
            description=self.description,
            licence=self.licence,
            beside=_beside(place) if self.beside else None,
            progress=place.progress,
        )
        if not self.by_effect:
            return Fitted({self.name: vector})
        held_out = split_pairs(data.items, self.held_out, self.seed).measured
        found = choose_for_pairs(
            place.engine,
            vector,
            held_out,
            where=self.where,
            seed=self.seed,
            progress=place.progress,
        )
        return Fitted({self.name: found.vector}, notes=(found.note,))


def _beside(place: FitPlace) -> RegisteredVectors:
    """What a new vector is compared with: those for the model that it is fitted on."""
    return RegisteredVectors(place.lookup().for_model(place.engine.info))


@dataclass(frozen=True)
class RegisteredVectors(Mapping[str, "ControlVector"]):
    """The vectors of a registry that is read for one model; each is read when it is looked at: they
    may be many."""

    registry: Registry

    def __getitem__(self, name: str) -> ControlVector:
        return self.registry.vector(name)

    def __iter__(self) -> Iterator[str]:
        for entry in self.registry.entries("vector", limit=10_000):
            yield entry.name

    def __len__(self) -> int:
        return sum(1 for _ in self)
