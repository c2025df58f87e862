"""An oracle that is asked about states in words."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

from pydantic import Discriminator, Field, StrictFloat, StrictInt, Tag

from steer.artefacts.oracle_form import FORMS, MAX_RANK, FormName, OracleForm
from steer.errors import SteerError, TooLarge
from steer.fit.requests.fields import (
    MAX_ITEMS,
    DataField,
    HeldOutField,
    LayerList,
    NameField,
    Seed,
    SiteField,
    Spelled,
)
from steer.fit.requests.inline import QUESTIONS, QuestionParam
from steer.fit.requests.request import CardFields, FitPlace, Fitted, site_points
from steer.fit.requests.trained.low_rank import MAX_BATCH
from steer.model import HookPoint

if TYPE_CHECKING:
    from steer.engines.base import Engine
    from steer.fit.data.questions import QuestionSet
    from steer.registry.registry import Registry

MAX_STATES_BYTES = 1 << 30
"""What the states of a job may take, beside the model that serves."""


def _told(value: Any) -> str:
    return "a name" if isinstance(value, str) else "a form"


class OracleRequest(CardFields):
    """Prompts with questions about their states and true answers, and how the oracle is trained."""

    command: ClassVar = "oracle"
    summary: ClassVar = "Train an oracle: an adapter that answers questions about states in words."
    form: ClassVar = QUESTIONS
    doing: ClassVar = "prompts and steps"
    batch_size: ClassVar = None
    needs_gradients: ClassVar = True
    resumes: ClassVar = True

    name: NameField
    questions: (
        Annotated[
            tuple[QuestionParam, ...], Field(min_length=1, max_length=MAX_ITEMS, fail_fast=True)
        ]
        | None
    ) = None
    data: DataField = None
    layers: Annotated[
        LayerList | None,
        Spelled("layers", "Such as 2-5 or 1,3; by default at a quarter, a half, three quarters."),
        Field(
            description="The layers whose states it learns to read; by default those at a quarter, "
            "a half and three quarters of the model."
        ),
    ] = None
    site: SiteField = "resid_post"
    oracle_form: Annotated[
        Annotated[FormName, Tag("a name")] | Annotated[OracleForm, Tag("a form")],
        Discriminator(_told),
        Spelled("form", "activation_oracle, latent_qa, selfie, or a form as JSON."),
        Field(description="How states are shown: a form of a paper by name, or one of your own."),
    ] = "activation_oracle"
    rank: Annotated[StrictInt, Field(ge=1, le=MAX_RANK, description="Of the adapter.")] = 16
    steps: Annotated[StrictInt, Field(ge=1, le=1_000_000, description="Training batches.")] = 300
    batch: Annotated[
        StrictInt, Field(ge=1, le=4096, description="Questions about states in one batch.")
    ] = 32
    rate: Annotated[
        StrictFloat,
        Field(gt=0, allow_inf_nan=False, description="AdamW's learning rate, falling to 0."),
    ] = 1e-3
    held_out: HeldOutField = 0.2
    seed: Annotated[
        Seed, Field(description="Draws the held-out share, the start and the batches.")
    ] = 0

    @property
    def asked_form(self) -> OracleForm:
        """How states are shown."""
        return (
            self.oracle_form
            if isinstance(self.oracle_form, OracleForm)
            else FORMS[self.oracle_form]
        )

    def points(self) -> Iterator[tuple[str, HookPoint]]:
        yield from site_points(self.site, self.layers)
        yield "/oracle_form", HookPoint(self.asked_form.layer, self.asked_form.site)

    def check(self, engine: Engine, registry: Registry, data: QuestionSet) -> None:
        from steer.engines.gradients import differentiable
        from steer.fit.methods.trained.asked_oracle import check_questions, default_layers
        from steer.fit.methods.trained.oracle import check_rank

        del registry
        if self.site not in ("resid_pre", "resid_mid", "resid_post"):
            raise SteerError(
                f"an oracle reads states of the residual stream; got site {self.site!r}: use "
                "resid_pre, resid_mid or resid_post",
                param="/site",
                code="unsupported_site",
            )
        if self.batch > MAX_BATCH:
            raise TooLarge(
                f"a job trains on at most {MAX_BATCH} questions at once, beside the requests of "
                f"clients; got {self.batch}: send a smaller batch, or use the command",
                param="/batch",
            )
        layers = len(set(self.layers or default_layers(engine)))
        needed = len(data) * layers * engine.info.width(self.site) * 4
        if needed > MAX_STATES_BYTES:
            raise TooLarge(
                f"the states of {len(data)} questions after {layers} layers take {needed >> 20} "
                f"MiB, and a job holds {MAX_STATES_BYTES >> 20}: send fewer questions or layers, "
                "or use the command",
                param=self.data_at,
            )
        modules = differentiable(engine).differentiate(lambda model: model.linear_modules())
        try:
            check_rank(modules, self.rank)
        except SteerError as error:
            raise error.at("/rank") from None
        try:
            check_questions(engine, data, self.asked_form)
        except SteerError as error:
            raise error if self.data is None else error.at(self.data_at) from None

    def work(self, data: QuestionSet) -> int:
        from steer.fit.methods.trained.asked_oracle import distinct_prompts

        return len(distinct_prompts(data.items)) + self.steps

    def run(self, place: FitPlace, data: QuestionSet) -> Fitted:
        from steer.fit.methods.trained.asked_oracle import fit_oracle

        oracle = fit_oracle(
            place.engine,
            data,
            name=self.name,
            layers=self.layers,
            site=self.site,
            oracle_form=self.oracle_form,
            rank=self.rank,
            steps=self.steps,
            batch=self.batch,
            rate=self.rate,
            held_out=self.held_out,
            seed=self.seed,
            description=self.description,
            licence=self.licence,
            progress=place.progress,
        )
        made: dict[str, Any] = oracle.card.provenance
        others = "held out" if made["held_out"] else "that were learnt too: give more prompts"
        return Fitted(
            {self.name: oracle},
            notes=(
                f"loss of the answers: {made['loss_before']} → {made['loss_after']} nats per token",
            ),
            title=f"{self.name}: right answers to {made['held_out_questions']} questions {others}",
            headings=("who answers, of what", "right"),
            rows=tuple((_WAYS[way], f"{share:.2f}") for way, share in made["right"].items()),
        )


_WAYS = {
    "oracle": "the oracle, of the state",
    "shuffled": "the oracle, of its coordinates permuted",
    "text": "the oracle, of the text",
    "untrained": "the model without it, of the state",
    "commonest": "the commonest answer to the question",
}
