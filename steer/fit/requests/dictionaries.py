"""Dictionaries, which need no labels: groups of neurons, and concepts of a token's state."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Field, StrictFloat, StrictInt

from steer.errors import TooLarge
from steer.fit.data.prompt import Positions
from steer.fit.requests.fields import MAX_ITEMS, CaptureField, DataField, NameField, Seed, Spelled
from steer.fit.requests.inline import PROMPTS
from steer.fit.requests.request import FitPlace, FitRequest, Fitted
from steer.prompts import PromptParam
from steer.spec import Layer, Site

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.fit.methods.dictionaries.dictionary import Dictionary
    from steer.model import HookPoint
    from steer.registry.registry import Registry


Components = Annotated[StrictInt, Field(ge=1, le=4096, description="How many to look for.")]
Iterations = Annotated[
    StrictInt, Field(ge=1, le=100_000, description="Steps of the factorisation.")
]


MAX_FACTORED_BYTES = 8 << 30
"""What a job may hold of activations and factors, in float64."""


class DictionaryFields(FitRequest):
    """Which prompts are read, and how many activations are factored."""

    form: ClassVar = PROMPTS
    many: ClassVar = True
    doing: ClassVar = "prompts and iterations"
    batch_size: ClassVar = 16

    name: NameField
    prompts: (
        Annotated[
            tuple[PromptParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    states: CaptureField = None
    layer: Annotated[Layer, Field(description="The layer to read.")]
    components: Components
    iterations: Iterations
    sample: Annotated[
        StrictInt,
        Field(
            ge=1,
            le=1_000_000,
            description="At most so many activations are factored; a uniform sample.",
        ),
    ] = 20_000
    seed: Annotated[Seed, Field(description="Draws the sample and the start.")] = 0

    def check(self, engine: Engine, registry: Registry, data: Any) -> None:
        """A job shares the server's memory, so what is factored there has a bound."""
        for at, point in self.points():
            engine.info.check_point(point, param=at)
            numbers = (2 * engine.info.width(point.site) + 4 * self.components) * self.sample
            if 8 * numbers > MAX_FACTORED_BYTES:
                raise TooLarge(
                    f"{self.sample} activations and {self.components} components need "
                    f"{8 * numbers / 2**30:.1f} GiB while they are factored, and a job may take "
                    f"{MAX_FACTORED_BYTES >> 30}: sample fewer, or use the command",
                    param="/sample",
                )

    def work(self, data: list[Prompt]) -> int:
        return len(data) + self.iterations

    def _fitted(self, found: Dictionary) -> Fitted:
        """Every component as a vector, and what has most of it."""
        names = [f"{self.name}-{n}" for n in range(len(found))]
        return Fitted(
            {name: found.vector(n, name=name) for n, name in enumerate(names)},
            title=f"{self.name}: {found.explained:.1%} of the squared length explained",
            headings=("component", "weight", "has most of it"),
            rows=tuple(
                (
                    str(n),
                    f"{float(found.scales[n]):.2f}",
                    " · ".join(one.text[-60:] for one in examples[:3]),
                )
                for n, examples in enumerate(found.examples)
            ),
        )


class SnmfRequest(DictionaryFields):
    """Sparse semi-NMF of one layer's MLP activations."""

    command: ClassVar = "snmf"
    summary: ClassVar = (
        "Find groups of MLP neurons (sparse semi-NMF), and keep each as a vector, NAME-N."
    )

    components: Components = 50
    keep: Annotated[
        StrictFloat, Field(ge=0, le=1, description="The share of neurons each keeps.")
    ] = 0.01
    iterations: Iterations = 100
    positions: Annotated[
        Positions,
        Spelled("position"),
        Field(description="mean is every token; response, the response's; or one token."),
    ] = "mean"

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        yield "/layer", HookPoint(self.layer, "mlp_act")

    def run(self, place: FitPlace, data: list[Prompt]) -> Fitted:
        from steer.fit.methods.dictionaries.snmf import fit_snmf

        found = fit_snmf(
            place.engine,
            data,
            layer=self.layer,
            components=self.components,
            keep=self.keep,
            iterations=self.iterations,
            positions=self.positions,
            sample=self.sample,
            seed=self.seed,
            batch=self.at_once(place),
            progress=place.progress,
        )
        return self._fitted(found)


class NmfRequest(DictionaryFields):
    """A dictionary of one token's states, with an L1 price on the weights."""

    command: ClassVar = "nmf"
    summary: ClassVar = (
        "Find a dictionary of token states (CoX-LMM), and keep each concept as a vector, NAME-N."
    )

    components: Components = 10
    penalty: Annotated[
        StrictFloat, Field(ge=0, allow_inf_nan=False, description="The price of weights.")
    ] = 0.01
    iterations: Iterations = 200
    site: Annotated[Site, Field(description="Where in the block the states are read.")] = (
        "resid_post"
    )
    positions: Annotated[
        Positions, Spelled("position"), Field(description="Which token's state is read.")
    ] = "last"

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        from steer.model import HookPoint

        yield "/layer", HookPoint(self.layer, self.site)

    def run(self, place: FitPlace, data: list[Prompt]) -> Fitted:
        from steer.fit.methods.dictionaries.nmf import fit_nmf

        found = fit_nmf(
            place.engine,
            data,
            layer=self.layer,
            components=self.components,
            penalty=self.penalty,
            iterations=self.iterations,
            site=self.site,
            positions=self.positions,
            sample=self.sample,
            seed=self.seed,
            batch=self.at_once(place),
            progress=place.progress,
        )
        return self._fitted(found)
