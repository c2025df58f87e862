"""The logit lens: every layer's residual stream read by the final norm and output matrix.

With a lens that is registered, tuned (2303.08112) or Jacobian, a layer's state first goes through
that layer's map. At the last layer all are the model's own next-token distribution.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from jaxtyping import Float
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from steer.artefacts.lens import Lens, LensMethod
from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.inspection.heatmap import HeatMap
from steer.inspection.method import Finite, Inspection, reads_logits
from steer.inspection.next_token import TokenChance, top_tokens
from steer.inspection.selection import (
    LayerChoice,
    PositionChoice,
    check_size,
    chosen_points,
    chosen_positions,
    plan_for,
    registered,
    roles_for,
)
from steer.inspection.token_labels import place_label
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import PromptInput, encode_prompt
from steer.prompts.roles import RoleRanges
from steer.readouts.measures import entropies
from steer.spec import SteeringSpec

_LOGITS_AT_ONCE = 1 << 24
"""Logits computed at a time: 64 MiB of float32, whatever the vocabulary."""


class LogitLensRequest(PromptInput):
    """Which layers and positions to read, and how many tokens to report at each place.

    `lens` names a registered lens, tuned or Jacobian; all layers are then those that it reads.
    """

    layers: LayerChoice = "all"
    positions: PositionChoice = "all"
    site: Literal["resid_pre", "resid_mid", "resid_post"] = "resid_post"
    top: Annotated[int, Field(strict=True, ge=1, le=100)] = 5
    steering: SteeringSpec | None = None
    lens: Annotated[str, Field(min_length=1, max_length=256)] | None = None


class LensCell(BaseModel):
    """One place: the likeliest next tokens, best first, and the distribution's entropy in nats."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer: int
    position: int
    top: tuple[TokenChance, ...]
    entropy: Finite


class LogitLensResult(BaseModel):
    """`cells` run over `positions` within each of `layers`; `tokens` are the whole prompt's.

    `fingerprint` names the steering under which the states were read, `lens` the lens that they
    were read through, as `name@hash`, and `lens_method` which it is.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    object: Literal["inspect.logit_lens"] = "inspect.logit_lens"
    model: str
    site: str
    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    positions: tuple[int, ...]
    cells: tuple[LensCell, ...]
    fingerprint: str | None = None
    lens: str | None = None
    lens_method: LensMethod | None = None

    def row(self, layer: int) -> tuple[LensCell, ...]:
        """The cells of one layer, in the order of `positions`."""
        place, width = self.layers.index(layer), len(self.positions)
        return self.cells[place * width : (place + 1) * width]


def logit_lens(
    engine: Engine,
    request: LogitLensRequest,
    *,
    plans: PlanCache | None = None,
    library: Library | None = None,
    roles: RoleRanges | None = None,
) -> LogitLensResult:
    """Reads the prompt through the logit lens, under `request.steering` where it has one.

    `plans` knows the artefacts that the steering names, `library` the lens; `roles` say whose words
    a prompt is that comes as ids. Raises `SteerError`
    with a pointer into the request, `TooLarge` where the answer would pass `MAX_NUMBERS`.
    """
    LOGIT_LENS.require(engine)
    prompt = encode_prompt(engine, request)
    lens = _lens_for(engine, request, library)
    points = _points(engine, request, lens)
    positions = chosen_positions(engine, prompt, request.positions)
    check_size(
        [("layers", len(points)), ("positions", len(positions)), ("tokens", request.top)],
        advice="read fewer positions or layers, or lower 'top'",
    )
    plan = plan_for(engine, request.steering, plans, at="/steering")
    captured = engine.capture(
        CaptureRequest(
            prompts=[prompt.ids],
            points=points,
            positions=positions,
            plans=[plan],
            roles=[roles or roles_for(plan, prompt)],
        )
    )[0]
    states = torch.cat([_read_by(lens, point, captured.states[point]) for point in points])
    places = [(point.layer, position) for point in points for position in positions]
    cells = []
    for (layer, position), (top, entropy) in zip(
        places, _readings(engine, states, request.top), strict=True
    ):
        cells.append(LensCell(layer=layer, position=position, top=top, entropy=entropy))
    return LogitLensResult(
        model=engine.info.name,
        site=request.site,
        tokens=prompt.tokens,
        layers=tuple(point.layer for point in points),
        positions=positions,
        cells=tuple(cells),
        fingerprint=plan.fingerprint if plan else None,
        lens=f"{lens.card.name}@{lens.sha256[:12]}" if lens else None,
        lens_method=lens.method if lens else None,
    )


def _points(engine: Engine, request: LogitLensRequest, lens: Lens | None) -> tuple[HookPoint, ...]:
    """Where states are read; "all" are those that the lens has a map for, and the last."""
    points = chosen_points(engine, request.layers, request.site)
    if lens is None:
        return points
    if request.layers == "all":
        points = tuple(p for p in points if p == points[-1] or lens.reads(p.layer, p.site))
    for point in points:
        lens.check_reads(point.layer, point.site)
    return points


def _lens_for(engine: Engine, request: LogitLensRequest, library: Library | None) -> Lens | None:
    if request.lens is None:
        return None
    return registered(engine, library, "lens", request.lens, lambda known: known.lens)


def _read_by(lens: Lens | None, point: HookPoint, states: Tensor) -> Tensor:
    return states if lens is None else lens.translated(states, point.layer, point.site)


def _readings(
    engine: Engine, states: Float[Tensor, "N d_model"], count: int
) -> list[tuple[tuple[TokenChance, ...], float]]:
    """Top tokens and entropy of each state, a bounded number of logits at a time."""
    rows = max(1, _LOGITS_AT_ONCE // engine.info.vocab_size)
    readings: list[tuple[tuple[TokenChance, ...], float]] = []
    for part in torch.split(states, rows):
        logits = engine.unembed(part).float().cpu()
        entropy = entropies(logits).tolist()
        readings += zip(top_tokens(logits, engine.tokenizer, count), entropy, strict=True)
    return readings


def lens_heat_map(result: LogitLensResult) -> HeatMap:
    """Layers × positions; the text is the likeliest token, the colour its probability."""
    rows = [result.row(layer) for layer in result.layers]
    return HeatMap(
        title=f"{(result.lens_method or 'logit').capitalize()} lens {result.lens or ''}".strip(),
        subtitle=f"{result.model} · {result.site} · likeliest next token at each layer",
        row_label="layer",
        column_label="prompt token",
        rows=[str(layer) for layer in result.layers],
        columns=[place_label(result.tokens, position) for position in result.positions],
        values=[[cell.top[0].probability for cell in row] for row in rows],
        texts=[[cell.top[0].token for cell in row] for row in rows],
        scale="probability",
    )


LOGIT_LENS = Inspection(
    name="logit_lens",
    summary="What each layer would say next, by the final norm and output matrix, or a lens.",
    request=LogitLensRequest,
    result=LogitLensResult,
    run=logit_lens,
    draw=lens_heat_map,
    possible=reads_logits,
)
