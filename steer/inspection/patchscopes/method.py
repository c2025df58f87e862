"""Patchscopes (2401.06102): read a hidden state by letting a model talk about it.

(S, i, M, ℓ) → f → (T, i*, M*, ℓ*): the state at layer ℓ and position i of the source prompt S is
put into the target prompt T at layer ℓ* and position i*, while the prompt is computed, and the
model goes on from there. Here M* = M and f is the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError
from steer.inspection.controls import (
    CONTROLS,
    ControlChoice,
    of_length,
    other_positions,
    text_target,
)
from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Inspection, reads_stream
from steer.inspection.patchscopes.patched_runs import (
    PatchedAnswer,
    StatePatch,
    TargetRun,
    run_targets,
)
from steer.inspection.patchscopes.result import (
    LayerPrecision,
    PatchscopeCell,
    PatchscopeResult,
    ShuffledControl,
    TargetSays,
    TextControl,
)
from steer.inspection.patchscopes.target import Preset, TargetPrompt, encode_target
from steer.inspection.selection import (
    LayerChoice,
    PositionChoice,
    check_size,
    chosen_points,
    chosen_positions,
    plan_for,
    roles_for,
)
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
    (`"next_token"`, 2401.06102 §4.1). With `max_tokens` 0 nothing is generated. `controls` are run
    beside: the source's text instead of a state, once for each position, and for each cell a
    shuffled state, which doubles the runs.
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
    controls: ControlChoice = CONTROLS

    @model_validator(mode="after")
    def _has_target(self) -> PatchscopeRequest:
        if self.preset == "custom" and self.target is None:
            raise ValueError("the preset 'custom' needs a 'target' prompt")
        return self


@dataclass(frozen=True)
class _Sweep:
    """A request, looked up: what is read where, and what it is put into at `place`.

    `targets` is None where each state goes to the layer it was read at.
    """

    source: EncodedPrompt
    positions: tuple[int, ...]
    points: tuple[HookPoint, ...]
    target: EncodedPrompt
    place: int
    targets: tuple[HookPoint, ...] | None
    plan: SteeringPlan | None


def patchscope(
    engine: Engine, request: PatchscopeRequest, *, plans: PlanCache | None = None
) -> PatchscopeResult:
    """Runs the sweep: one capture of the source, then all target runs in shared batches.

    `plans` knows the artefacts that `source.steering` names. Raises `SteerError` with a pointer
    into the request, `TooLarge` for more than `MAX_CELLS` cells.
    """
    PATCHSCOPE.require(engine)
    sweep = _sweep(engine, request, plans)
    patches, shuffled = _patches(engine, request, sweep)
    texts = _texts(engine, request, sweep, {p.position: p.expected for p in patches})
    runs = [
        TargetRun(sweep.target.ids),
        *(TargetRun(sweep.target.ids, sweep.place, p, p.expected) for p in patches),
        *(TargetRun(sweep.target.ids, sweep.place, p, p.expected) for p in shuffled),
        *texts.values(),
    ]
    said = iter(run_targets(engine, runs, top=request.top, max_tokens=request.max_tokens))
    baseline = TargetSays(**_says(next(said)))
    read = [_scored(next(said)) for _ in patches]
    other = [ShuffledControl(position=p.position, **_scored(next(said))) for p in shuffled]
    text_only = tuple(TextControl(position=n, **_scored(next(said))) for n in texts)
    cells = tuple(
        PatchscopeCell(
            position=patch.position,
            layer=patch.source.layer,
            target_layer=patch.target.layer,
            shuffled=other[n] if other else None,
            **read[n],
        )
        for n, patch in enumerate(patches)
    )
    targets = sweep.targets
    return PatchscopeResult(
        model=engine.info.name,
        preset=request.preset,
        site=request.site,
        source_tokens=sweep.source.tokens,
        positions=sweep.positions,
        layers=tuple(point.layer for point in sweep.points),
        target_tokens=sweep.target.tokens,
        target_position=sweep.place,
        target_layers=None if targets is None else tuple(point.layer for point in targets),
        baseline=baseline,
        text_only=text_only,
        cells=cells,
        precision=_precision(cells, baseline, text_only),
        fingerprint=sweep.plan.fingerprint if sweep.plan else None,
    )


def _sweep(engine: Engine, request: PatchscopeRequest, plans: PlanCache | None) -> _Sweep:
    source = encode_prompt(engine, request.source, at="/source")
    positions = chosen_positions(engine, source, request.positions)
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
    return _Sweep(source, positions, points, target, place, targets, plan)


def _patches(
    engine: Engine, request: PatchscopeRequest, sweep: _Sweep
) -> tuple[list[StatePatch], list[StatePatch]]:
    """The states of the source prompt, each with where it goes and what it should say; and, in
    their order, the shuffled ones, where there are any."""
    others: dict[int, int] = {}
    if "shuffled" in request.controls:
        others = other_positions(sweep.positions, len(sweep.source.ids))
    read = tuple(dict.fromkeys((*sweep.positions, *others.values())))
    captured = engine.capture(
        CaptureRequest(
            prompts=[sweep.source.ids],
            points=sweep.points,
            positions=read,
            plans=[sweep.plan],
            roles=[roles_for(sweep.plan, sweep.source)],
            logits="all" if request.expect == "next_token" else "none",
        )
    )[0]
    expected = dict.fromkeys(sweep.positions, None)
    if request.expect == "token":
        expected = {position: sweep.source.ids[position] for position in sweep.positions}
    elif captured.logits is not None:
        expected = {n: int(captured.logits[n].argmax()) for n in sweep.positions}
    patches, shuffled = [], []
    for position, point in product(sweep.positions, sweep.points):
        states = captured.states[point]
        state = states[read.index(position)]
        for target in sweep.targets or (point,):
            patches.append(StatePatch(position, point, target, state, expected[position]))
            if others:
                other = of_length(states[read.index(others[position])], state)
                one = StatePatch(others[position], point, target, other, expected[position])
                shuffled.append(one)
    return patches, shuffled


def _texts(
    engine: Engine,
    request: PatchscopeRequest,
    sweep: _Sweep,
    expected: Mapping[int, int | None],
) -> dict[int, TargetRun]:
    """For each position the target prompt with the text that led to it."""
    if "text" not in request.controls:
        return {}
    return {
        position: TargetRun(
            text_target(
                engine, sweep.target, sweep.place, sweep.source, position, request.max_tokens
            ),
            expected=expected[position],
        )
        for position in sweep.positions
    }


def _says(answer: PatchedAnswer) -> dict[str, Any]:
    return {"top": answer.top, "text": answer.text}


def _scored(answer: PatchedAnswer) -> dict[str, Any]:
    expected = answer.expected
    hit = None if expected is None else answer.top[0].id == expected.id
    return {**_says(answer), "expected": expected, "hit": hit}


def _precision(
    cells: Sequence[PatchscopeCell], baseline: TargetSays, text_only: Sequence[TextControl]
) -> tuple[LayerPrecision, ...]:
    """precision@1 of each pair of layers, in the order of the cells; empty without `expect`."""
    pairs: dict[tuple[int, int], list[PatchscopeCell]] = {}
    for cell in cells:
        if cell.expected is not None:
            pairs.setdefault((cell.layer, cell.target_layer), []).append(cell)
    found = []
    for (layer, target), group in pairs.items():
        hits: dict[str, list[bool | None]] = {
            "none": [c.expected is not None and baseline.top[0].id == c.expected.id for c in group],
            "text": [one.hit for one in text_only],
            "shuffled": [c.shuffled.hit for c in group if c.shuffled is not None],
        }
        found.append(
            LayerPrecision(
                layer=layer,
                target_layer=target,
                precision_at_1=_share([cell.hit for cell in group]),
                positions=len(group),
                controls={name: _share(each) for name, each in hits.items() if each},
            )
        )
    return tuple(found)


def _share(hits: Sequence[bool | None]) -> float:
    return sum(map(bool, hits)) / len(hits)


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
