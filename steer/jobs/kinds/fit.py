"""Jobs of the kind `fit`: a vector from contrastive prompts, fitted on the serving engine."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from steer.artefacts.control_vector import ControlVector
from steer.engines.base import Engine
from steer.errors import SteerError, Unsupported, pointer
from steer.fit.data.pairs import Pair, PairSet, parse_pairs
from steer.fit.data.prompt import Positions
from steer.fit.methods.card import WhereName
from steer.fit.methods.fitting import fit, split_pairs
from steer.fit.methods.method import MethodName
from steer.jobs.kinds.kind import JobContext, JobKind
from steer.model import HookPoint
from steer.prompts import PromptParam, prompt_of
from steer.registry.registry import Registry
from steer.spec import Site, check_name


class PairParam(BaseModel):
    """A prompt that has the attribute, and the one most like it that has not."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    positive: PromptParam
    negative: PromptParam


class RefineParam(BaseModel):
    """The SAE in whose latents the differences are compared (Words in Motion, 2406.11624)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    sae: Annotated[str, Field(min_length=1, max_length=256)]


class FitParams(BaseModel):
    """What to fit: pairs as an array, or as the text of a JSON lines file in `data`.

    The rest is as in `steer.fit.fit`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, AfterValidator(check_name)]
    pairs: Annotated[tuple[PairParam, ...], Field(min_length=2)] | None = None
    data: Annotated[str, Field(min_length=1)] | None = None
    method: MethodName = "diffmean"
    site: Site = "resid_post"
    layers: Annotated[tuple[int, ...], Field(min_length=1, max_length=1024)] | None = None
    positions: Positions = "last"
    refine: RefineParam | None = None
    where: WhereName = "last"
    held_out: Annotated[float, Field(ge=0, le=0.9)] = 0.2
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    best: Annotated[int, Field(ge=1, le=1024)] = 1
    description: Annotated[str, Field(max_length=4096)] = ""
    licence: Annotated[str, Field(max_length=256)] = ""

    @model_validator(mode="after")
    def _one_source(self) -> FitParams:
        if (self.pairs is None) == (self.data is None):
            raise ValueError("give the pairs either as 'pairs' or as JSON lines in 'data'")
        return self


def pairs_of(params: FitParams) -> PairSet:
    """The pairs; raises `FileFormatError` that names the line."""
    if params.data is not None:
        try:
            found = parse_pairs(params.data.encode(), "data")
        except SteerError as error:
            raise error.at("/data") from None
        except UnicodeEncodeError as error:
            raise SteerError(
                f"data is not text: {error.reason}", param="/data", code="invalid_value"
            ) from None
        if len(found) < 2:
            raise SteerError(
                "one pair cannot be told from chance: give at least 2",
                param="/data",
                code="no_pairs",
            )
        return found
    return PairSet.of(
        [Pair(prompt_of(one.positive), prompt_of(one.negative)) for one in params.pairs or ()]
    )


def _check(engine: Engine, registry: Registry, params: FitParams) -> None:
    if not engine.capabilities.captures:
        raise Unsupported(
            "this engine cannot read activations, which fitting needs: GET "
            "/v1/steering/capabilities says what it can",
            code="no_captures",
        )
    pairs_of(params)
    if params.refine is not None:
        try:
            registry.sae(params.refine.sae)
        except SteerError as error:
            raise error.at("/refine/sae") from None
    for place, layer in enumerate(params.layers or ()):
        try:
            engine.info.check_point(HookPoint(layer, params.site))
        except SteerError as error:
            error.param = pointer("layers", place)
            raise
    if params.layers is None:
        try:
            engine.info.check_point(HookPoint(0, params.site))
        except SteerError as error:
            error.param = "/site"
            raise


def _run(context: JobContext, params: FitParams) -> dict[str, Any]:
    pairs = pairs_of(params)
    split = split_pairs(pairs.items, params.held_out, params.seed)
    vector = fit(
        context.engine,
        pairs,
        name=params.name,
        method=params.method,
        site=params.site,
        layers=params.layers,
        positions=params.positions,
        refine=None if params.refine is None else {"sae": params.refine.sae},
        library=context.registry,
        where=params.where,
        held_out=params.held_out,
        seed=params.seed,
        best=params.best,
        description=params.description,
        licence=params.licence,
        progress=context.counter(len(split.fitted) + len(split.measured), "reading pairs"),
    )
    entry, created = context.registry.add(params.name, vector)
    return {
        "vector": entry.id,
        "name": entry.name,
        "version": entry.version,
        "sha256": entry.sha256,
        "created": created,
        **_summary(vector),
    }


def _count(params: FitParams) -> int:
    if params.pairs is not None:
        return len(params.pairs)
    return sum(1 for line in (params.data or "").splitlines() if line.strip())


def _summary(vector: ControlVector) -> dict[str, Any]:
    card = vector.card
    return {
        "layers": list(card.layers),
        "default_layers": list(card.used_layers),
        "measures": {
            str(layer): one.model_dump(mode="json") for layer, one in sorted(card.measures.items())
        },
    }


FIT = JobKind(
    name="fit",
    params=FitParams,
    run=_run,
    check=_check,
    data=frozenset({"pairs", "data"}),
    shown=lambda params: {"pairs": _count(params)},
    # A second run registers the same content again, which is no new version; at worst, where the
    # arithmetic differs, one more version.
    repeatable=True,
)
