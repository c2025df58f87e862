"""Patchscopes (2401.06102): read a hidden state by letting a model talk about it.

(S, i, M, ℓ) → f → (T, i*, M*, ℓ*): the state at layer ℓ and position i of the source prompt S is
put into the target prompt T at layer ℓ* and position i*, while the prompt is computed, and the
model goes on from there. Here M* = M and f is the identity.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError
from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Inspection, reads_stream
from steer.inspection.next_token import TokenChance
from steer.inspection.patched_runs import PatchedAnswer, StatePatch, run_patched
from steer.inspection.selection import (
    LayerChoice,
    PositionChoice,
    check_size,
    chosen_points,
    chosen_positions,
    plan_for,
)
from steer.inspection.target import Preset, TargetPrompt, encode_target
from steer.inspection.token_labels import place_label, token_label
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import EncodedPrompt, PromptInput, encode_prompt
from steer.spec import SteeringSpec

MAX_CELLS = 1024


class SourcePrompt(PromptInput):
    """S: the prompt whose states are read, under `steering` where it is given."""

    steering: SteeringSpec | None = None


class PatchscopeRequest(BaseModel):
    """A sweep: every source position × source layer × target layer is one cell.

    `preset` names a target prompt, which `target` may replace. `target_layers: "same"` patches at
    the layer that was read. `expect` scores each cell against the source's own token
    (`"token"`), or against what the model itself says next at the source position
    (`"next_token"`, 2401.06102 §4.1). With `max_tokens` 0 nothing is generated.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: SourcePrompt
    positions: PositionChoice = (-1,)
    layers: LayerChoice = "all"
    preset: Preset = "identity"
    target: TargetPrompt | None = None
    target_layers: LayerChoice | Literal["same"] = "same"
    site: Literal["resid_pre", "resid_mid", "resid_post"] = "resid_post"
    mapping: Literal["identity"] = "identity"
    max_tokens: Annotated[int, Field(strict=True, ge=0, le=256)] = 12
    top: Annotated[int, Field(strict=True, ge=1, le=100)] = 5
    expect: Literal["token", "next_token"] | None = None

    @model_validator(mode="after")
    def _has_target(self) -> PatchscopeRequest:
        if self.preset == "custom" and self.target is None:
            raise ValueError("the preset 'custom' needs a 'target' prompt")
        return self


class TargetSays(BaseModel):
    """What the target run says: its likeliest next tokens, and what it generates."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    top: tuple[TokenChance, ...]
    text: str | None = None


class PatchscopeCell(TargetSays):
    """What the target run says with one state patched in.

    `expected` is the token that `expect` asked for, with its probability; `hit` whether it came
    first.
    """

    position: int
    layer: int
    target_layer: int
    expected: TokenChance | None = None
    hit: bool | None = None


class LayerPrecision(BaseModel):
    """precision@1 over the source positions, for one source and target layer."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    target_layer: int
    precision_at_1: float
    positions: int


class PatchscopeResult(BaseModel):
    """`cells` run over target layers within source layers within positions.

    `baseline` is the target prompt without a patch: what it says anyway. `target_layers` is None
    where each state was patched at its own layer.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.patchscope"] = "inspect.patchscope"
    model: str
    preset: Preset
    site: str
    source_tokens: tuple[str, ...]
    positions: tuple[int, ...]
    layers: tuple[int, ...]
    target_tokens: tuple[str, ...]
    target_position: int
    target_layers: tuple[int, ...] | None = None
    baseline: TargetSays
    cells: tuple[PatchscopeCell, ...]
    precision: tuple[LayerPrecision, ...] = ()
    fingerprint: str | None = None


def patchscope(
    engine: Engine, request: PatchscopeRequest, *, plans: PlanCache | None = None
) -> PatchscopeResult:
    """Runs the sweep: one capture of the source, then all target runs in shared batches.

    `plans` knows the artefacts that `source.steering` names. Raises `SteerError` with a pointer
    into the request, `TooLarge` for more than `MAX_CELLS` cells.
    """
    PATCHSCOPE.require(engine)
    source = encode_prompt(engine, request.source, at="/source")
    positions = chosen_positions(source, request.positions)
    points = chosen_points(engine, request.layers, request.site)
    targets = None
    if request.target_layers != "same":
        targets = chosen_points(engine, request.target_layers, request.site, at="/target_layers")
    check_size(
        [
            ("positions", len(positions)),
            ("layers", len(points)),
            ("target layers", len(targets) if targets else 1),
        ],
        advice="choose fewer",
        limit=MAX_CELLS,
    )
    target, place = encode_target(engine, request.preset, request.target)
    plan = plan_for(engine, request.source.steering, plans, at="/source/steering")
    patches = _read(engine, request, source, plan, positions, points, targets)
    baseline, *answers = run_patched(
        engine,
        target.ids,
        place,
        [None, *patches],
        top=request.top,
        max_tokens=request.max_tokens,
    )
    cells = tuple(_cell(p, answer) for p, answer in zip(patches, answers, strict=True))
    return PatchscopeResult(
        model=engine.info.name,
        preset=request.preset,
        site=request.site,
        source_tokens=source.tokens,
        positions=positions,
        layers=tuple(point.layer for point in points),
        target_tokens=target.tokens,
        target_position=place,
        target_layers=None if targets is None else tuple(point.layer for point in targets),
        baseline=TargetSays(top=baseline.top, text=baseline.text),
        cells=cells,
        precision=_precision(cells),
        fingerprint=plan.fingerprint if plan else None,
    )


def _read(
    engine: Engine,
    request: PatchscopeRequest,
    source: EncodedPrompt,
    plan: SteeringPlan | None,
    positions: tuple[int, ...],
    points: tuple[HookPoint, ...],
    targets: tuple[HookPoint, ...] | None,
) -> list[StatePatch]:
    """The states of the source prompt, each with where it goes and what it should say."""
    captured = engine.capture(
        CaptureRequest(
            prompts=[source.ids],
            points=points,
            positions=positions,
            plans=[plan],
            logits="all" if request.expect == "next_token" else "none",
        )
    )[0]
    expected: list[int | None] = [None] * len(positions)
    if request.expect == "token":
        expected = [source.ids[position] for position in positions]
    elif captured.logits is not None:
        expected = [int(captured.logits[position].argmax()) for position in positions]
    return [
        StatePatch(position, point, target, captured.states[point][row], expected[row])
        for row, position in enumerate(positions)
        for point in points
        for target in targets or (point,)
    ]


def _cell(patch: StatePatch, answer: PatchedAnswer) -> PatchscopeCell:
    expected = answer.expected
    return PatchscopeCell(
        position=patch.position,
        layer=patch.source.layer,
        target_layer=patch.target.layer,
        top=answer.top,
        text=answer.text,
        expected=expected,
        hit=None if expected is None else answer.top[0].id == expected.id,
    )


def _precision(cells: Sequence[PatchscopeCell]) -> tuple[LayerPrecision, ...]:
    """precision@1 of each pair of layers, in the order of the cells; empty without `expect`."""
    hits: dict[tuple[int, int], list[bool]] = {}
    for cell in cells:
        if cell.hit is not None:
            hits.setdefault((cell.layer, cell.target_layer), []).append(cell.hit)
    return tuple(
        LayerPrecision(
            layer=layer,
            target_layer=target,
            precision_at_1=sum(found) / len(found),
            positions=len(found),
        )
        for (layer, target), found in hits.items()
    )


def patchscope_heat_map(result: PatchscopeResult) -> HeatMap:
    """Source layers × positions where each state is patched at its own layer; source layers ×
    target layers where one position is swept. The text is the first token; hits are framed.

    Raises `SpecError` for a sweep over both.
    """
    if result.target_layers is not None and len(result.positions) > 1:
        raise SpecError(
            f"a sweep over {len(result.positions)} positions and {len(result.target_layers)} "
            "target layers has three dimensions: choose one position, or target_layers 'same'",
            param="/positions",
            code="no_heat_map",
        )
    swept = result.target_layers is not None
    if result.target_layers is not None:
        columns = [str(layer) for layer in result.target_layers]
        source = place_label(result.source_tokens, result.positions[0]).replace("\n", " at ")
    else:
        columns = [place_label(result.source_tokens, position) for position in result.positions]
        source = "each token"
    # Cells come with the position outermost: by source layer they are read across.
    width, height = len(columns), len(result.layers)
    order = [
        [(row * width + column) if swept else (column * height + row) for column in range(width)]
        for row in range(height)
    ]
    cells = result.cells
    return HeatMap(
        title=f"Patchscope · {result.preset}",
        subtitle=f"{result.model} · state of {source} → "
        f"{token_label(result.target_tokens[result.target_position])!r} of the target prompt",
        row_label="source layer",
        column_label="target layer" if swept else "source token",
        rows=[str(layer) for layer in result.layers],
        columns=columns,
        values=[[cells[n].top[0].probability for n in row] for row in order],
        texts=[[cells[n].top[0].token for n in row] for row in order],
        scale="probability",
        marked=frozenset(
            (r, c) for r, row in enumerate(order) for c, n in enumerate(row) if cells[n].hit
        ),
    )


def _run(
    engine: Engine, request: PatchscopeRequest, *, plans: PlanCache, library: Library
) -> PatchscopeResult:
    del library  # a patchscope names artefacts in its steering alone
    return patchscope(engine, request, plans=plans)


def _possible(able: Capabilities) -> bool:
    return reads_stream(able) and "patch" in able.kinds


PATCHSCOPE = Inspection(
    name="patchscope",
    summary="Puts hidden states of one prompt into another, and lets the model say what they mean.",
    request=PatchscopeRequest,
    result=PatchscopeResult,
    run=_run,
    draw=patchscope_heat_map,
    possible=_possible,
)
