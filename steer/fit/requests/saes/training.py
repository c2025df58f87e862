"""An SAE, trained on the serving model's own states."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeAlias

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictFloat,
    StrictInt,
)

from steer.errors import SteerError, Unsupported, pointer
from steer.fit.data.labels import truth
from steer.fit.requests.fields import (
    MAX_ITEMS,
    CaptureField,
    DescriptionField,
    LicenceField,
    NameField,
    ReadWhereField,
    Seed,
    SiteField,
    Spelled,
)
from steer.prompts import PromptParam, as_chat, prompt_of
from steer.spec import Layer, Where

if TYPE_CHECKING:
    import torch

    from steer.engines.base import Engine
    from steer.fit.data.prompt import Prompt
    from steer.fit.measure.answers import Progress
    from steer.fit.saes.options import SAEOptions
    from steer.fit.saes.training import TrainedSAE
    from steer.registry.registry import Registry

LEAST_TEXTS = 16
Counter: TypeAlias = "Callable[[int, str], Progress | None]"
"""Given how many there are of what, gives what is to be told of those that are done."""
Known: TypeAlias = Annotated[
    StrictBool, BeforeValidator(truth, json_schema_input_type=bool | Literal[0, 1])
]


def _uncounted(_total: int, _what: str) -> None:
    """Nobody listens."""


def _number(low: float, high: float, description: str) -> Any:
    return Field(ge=low, le=high, allow_inf_nan=False, description=description)


class SAETrainingRequest(BaseModel):
    """Texts, a hook point, and how the SAE is trained on the states that the model has there.

    The states are kept in a folder of the user's cache while the work goes on, and so is a
    checkpoint: the same request, made again, goes on where the first was ended.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    data: ClassVar[tuple[str, ...]] = ("prompts", "labels")

    name: NameField
    prompts: Annotated[
        tuple[PromptParam, ...],
        Spelled(argument=True, help="JSON lines: texts, messages, or objects with a label too."),
        Field(
            min_length=LEAST_TEXTS,
            max_length=MAX_ITEMS,
            fail_fast=True,
            description="What is read: texts, or lists of messages.",
        ),
    ]
    states: CaptureField = None
    layer: Annotated[Layer, Field(description="The layer whose states are rebuilt.")]
    site: SiteField = "resid_post"
    labels: Annotated[
        dict[
            Annotated[str, Field(min_length=1, max_length=256)],
            Annotated[tuple[Known | None, ...], Field(max_length=MAX_ITEMS, fail_fast=True)],
        ]
        | None,
        Field(
            min_length=1,
            max_length=1024,
            description="For each label whether each text has it: true or 1, false or 0, or null "
            "where that is not known. The first latents are taught one of them each (G-SAE).",
        ),
    ] = None
    chat: Annotated[
        StrictBool,
        Field(description="Read texts as a user's message, in the model's chat template."),
    ] = False
    answer_tokens: Annotated[
        StrictInt,
        _number(0, 4096, "Let the model answer each text with up to so many tokens, read as well."),
    ] = 0
    context: Annotated[
        StrictInt, _number(8, 1 << 16, "Texts of more tokens are cut into pieces of so many.")
    ] = 256
    skip: Annotated[
        StrictInt,
        _number(
            0,
            1024,
            "First tokens of a piece that are not trained on: many models keep there what belongs "
            "to no word.",
        ),
    ] = 1
    where: ReadWhereField = None
    architecture: Annotated[
        Literal["topk", "batchtopk", "jumprelu", "matching_pursuit"],
        Field(description="What is trained; batchtopk is kept as a jumprelu, which it becomes."),
    ] = "topk"
    latents: Annotated[StrictInt, _number(2, 1 << 20, "How many features it has.")] = 4096
    k: Annotated[StrictInt, _number(1, 4096, "Features that are active on a token.")] = 32
    epochs: Annotated[StrictFloat, _number(0.001, 1000, "Passes over the states.")] = 1.0
    rows: Annotated[StrictInt, _number(16, 1 << 16, "Tokens in one step.")] = 2048
    rate: Annotated[StrictFloat, _number(1e-8, 1, "Adam's learning rate.")] = 1e-3
    held_out: Annotated[
        StrictFloat, _number(0.01, 0.9, "The share of the texts kept for measuring.")
    ] = 0.05
    guide_weight: Annotated[StrictFloat, _number(0, 1e6, "What the labels weigh.")] = 0.1
    prediction_weight: Annotated[
        StrictFloat,
        _number(
            0,
            1e6,
            "What the divergence of the model's predictions on rebuilt states weighs; it needs "
            "derivatives.",
        ),
    ] = 0.0
    batch: Annotated[StrictInt, _number(1, 1024, "Texts read at once.")] = 16
    seed: Annotated[
        Seed, Field(description="Draws the first weights, the order, and the held-out share.")
    ] = 0
    description: DescriptionField = ""
    licence: LicenceField = ""

    def check(self, engine: Engine, registry: Registry | None = None) -> None:
        """Raises what is wrong, before anything is read."""
        from steer.engines.gradients import differentiable
        from steer.model import HookPoint

        if not engine.capabilities.captures:
            raise Unsupported(
                "this engine cannot read activations, which an SAE is trained on: GET "
                "/v1/steering/capabilities says what it can",
                code="no_captures",
            )
        try:
            engine.info.check_point(HookPoint(self.layer, self.site))
        except SteerError as error:
            raise error.at("/layer") from None
        if self.k > self.latents:
            raise SteerError(
                f"{self.k} of {self.latents} latents cannot be active: 'k' is at most 'latents'",
                param="/k",
                code="invalid_option",
            )
        for name, given in (self.labels or {}).items():
            if len(given) != len(self.prompts):
                raise SteerError(
                    f"the label {name!r} is given for {len(given)} of {len(self.prompts)} texts: "
                    "give true or false for each, null where it is not known",
                    param=pointer("labels", name),
                    code="invalid_option",
                )
        if self.labels is not None and self.architecture == "matching_pursuit":
            raise SteerError(
                "labels teach pre-activations, and matching pursuit has none: train topk, "
                "batchtopk or jumprelu",
                param="/architecture",
                code="invalid_option",
            )
        if len(self.classes) > self.latents:
            raise SteerError(
                f"there are {len(self.classes)} labels and {self.latents} latents: each is taught "
                "to one",
                param="/latents",
                code="invalid_option",
            )
        if self.states is not None and self.answer_tokens:
            raise Unsupported(
                "the model does not run where its states are given: leave out 'states', or capture "
                "the answers and read them as texts",
                param="/answer_tokens",
                code="no_model",
            )
        if self.prediction_weight:
            differentiable(engine)
        if self.where is not None:
            self._check_where(engine, self.where)

    def _check_where(self, engine: Engine, where: Where) -> None:
        from steer.engines.selecting import TokenChoice

        if self.prediction_weight:
            raise Unsupported(
                "predictions are learnt from texts whose states are all rebuilt: leave out 'where' "
                "or 'prediction_weight'",
                param="/where",
                code="unsupported",
            )
        TokenChoice.of(engine, where, at="/where")

    @property
    def classes(self) -> tuple[str, ...]:
        """The labels in alphabetical order: that of the latents that are taught."""
        return tuple(sorted(self.labels or ()))

    @property
    def options(self) -> SAEOptions:
        from steer.fit.saes.options import SAEOptions

        return SAEOptions(
            architecture=self.architecture,
            latents=self.latents,
            k=self.k,
            epochs=self.epochs,
            batch=self.rows,
            rate=self.rate,
            guide_weight=self.guide_weight,
            prediction_weight=self.prediction_weight,
            seed=self.seed,
        )

    def work_folder(self, engine: Engine) -> Path:
        """Where the states and the checkpoint lie while the work goes on."""
        from steer.registry.location import cache_folder

        # Written only where it says something, so that what was begun without it goes on.
        without = {"where"} if self.where is None else set()
        what = [self.model_dump(mode="json", exclude=without), engine.info.own_name]
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        return cache_folder() / "training" / key

    def asked(self, engine: Engine) -> list[Prompt]:
        given = [prompt_of(one) for one in self.prompts]
        return [as_chat(engine.tokenizer, one) for one in given] if self.chat else given

    def run(
        self,
        engine: Engine,
        counter: Counter = _uncounted,
        *,
        device: str | None = None,
    ) -> TrainedSAE:
        """Reads the states, trains on `device` (None: the processor), and measures. `counter` is
        asked for what to tell of texts, then of steps. Raises `SteerError`."""
        from steer.fit.bulk.capturing import BulkReading, capture_to
        from steer.fit.bulk.selected import pieces, selected_tokens
        from steer.fit.bulk.shards import CapturedStates
        from steer.fit.saes.predictions import ModelPredictions
        from steer.fit.saes.training import steps_of, train_sae
        from steer.fit.saes.worth import texts_apart, with_worth
        from steer.model import HookPoint

        point, folder = HookPoint(self.layer, self.site), self.work_folder(engine)
        length = None if self.answer_tokens else self.context
        asked = self.asked(engine)
        texts, owners = pieces(engine, asked, length)
        selected = None
        if self.where is not None:
            selected = selected_tokens(
                engine, asked, self.where, length, answered=self.answer_tokens > 0
            )
        reading = BulkReading(
            (point,),
            skip=self.skip,
            answer_tokens=self.answer_tokens,
            seed=self.seed,
            batch=self.batch,
        )
        told = counter(len(texts), "texts")
        capture_to(engine, texts, folder / "states", reading, selected=selected, progress=told)
        states = CapturedStates.open(folder / "states")
        predictions = None
        if self.prediction_weight:
            predictions = ModelPredictions(engine, point, texts, self.options, skip=self.skip)
        steps = steps_of([states], self.options, self.held_out)
        found = train_sae(
            [states],
            self.options,
            folder,
            name=self.name,
            device=device,
            held_out=self.held_out,
            text_labels=[self._targets(owners)] if self.classes else None,
            predictions=predictions,
            progress=counter(steps, "steps"),
            description=self.description,
            licence=self.licence,
        )
        # The loss is that of whole texts on rebuilt states, of which a selection is a part.
        apart = None
        if self.where is None:
            apart = texts_apart([states], [texts], held_out=self.held_out, seed=self.seed)
        return with_worth(engine, found, apart, skip=self.skip, classes=self.classes)

    def forget(self, engine: Engine) -> None:
        """Removes what lies in the work folder."""
        shutil.rmtree(self.work_folder(engine), ignore_errors=True)

    def _targets(self, owners: list[int]) -> torch.Tensor:
        """`[texts, classes]`: of each piece 1 for what its text has, 0 for what it has not, NaN
        for what is not known."""
        import torch

        assert self.labels is not None, "only asked for where there are classes"
        columns = [self.labels[name] for name in self.classes]
        of_text = torch.tensor(
            [[torch.nan if known is None else float(known) for known in one] for one in columns]
        )
        return of_text.T[torch.tensor(owners)]
