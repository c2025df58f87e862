"""Causal tracing (2202.05262): which states carry what a subject tells the model.

The subject's embeddings are disturbed by noise, so that the model no longer knows of whom it is
asked; then one clean state at a time is put back. Where the answer comes back, that state was
enough to carry it, whatever its neighbours say.
"""

from __future__ import annotations

import random
from typing import Annotated, Literal

import torch
from pydantic import Field

from steer.artefacts.library import Library
from steer.engines.base import CaptureRequest, Engine
from steer.errors import SpecError, TooLarge
from steer.inspection.method import Inspection, reads_stream
from steer.inspection.next_token import TokenChance, TokenChoice, chosen_token
from steer.inspection.selection import (
    LayerChoice,
    PositionChoice,
    chosen_points,
    chosen_positions,
)
from steer.inspection.tracing.noise import EMBEDDING, Disturbed, Restored, chances, noise_of
from steer.inspection.tracing.result import (
    DisturbedChance,
    TracedCell,
    TraceResult,
    trace_heat_map,
)
from steer.model import Capabilities, HookPoint
from steer.plan.cache import PlanCache
from steer.prompts import EncodedPrompt, PromptInput, encode_prompt, token_texts
from steer.prompts.roles import RoleRanges

MAX_RUNS = 4096
"""Runs of the prompt that one tracing may make."""


class TraceRequest(PromptInput):
    """A prompt, the `subject` in it (a piece of its text, or positions), and the answer traced.

    The answer is `token`, an id or a text that is one token; without one what the model says.
    `noise` is in standard deviations of the prompt's embeddings, drawn `draws` times. `window`
    layers around each are put back at a time. `positions` of `"all"` are those from the subject on:
    tokens before it do not see it.
    """

    subject: (
        Annotated[str, Field(min_length=1, max_length=1024)]
        | Annotated[
            tuple[Annotated[int, Field(strict=True)], ...],
            Field(min_length=1, max_length=256, fail_fast=True),
        ]
    )
    token: TokenChoice | None = None
    layers: LayerChoice = "all"
    positions: PositionChoice = "all"
    site: Literal["resid_post", "attn_out", "mlp_out"] = "resid_post"
    window: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    noise: Annotated[float, Field(gt=0, le=100, allow_inf_nan=False)] = 3.0
    draws: Annotated[int, Field(strict=True, ge=1, le=64)] = 3
    seed: Annotated[int, Field(strict=True, ge=0, le=1 << 31)] = 0


def trace(
    engine: Engine,
    request: TraceRequest,
    *,
    plans: PlanCache | None = None,  # noqa: ARG001
    library: Library | None = None,  # noqa: ARG001
    roles: RoleRanges | None = None,  # noqa: ARG001
) -> TraceResult:
    """The answer's probability clean, with noise at the subject, and with each state put back.

    Raises `SteerError` with a pointer into the request, `TooLarge` for more than `MAX_RUNS` runs.
    """
    TRACE.require(engine)
    prompt = encode_prompt(engine, request)
    subject = _subject(engine, prompt, request)
    points = chosen_points(engine, request.layers, request.site)
    positions = chosen_positions(engine, prompt, request.positions)
    if request.positions == "all":
        positions = positions[subject[0] :]
    _check_runs(len(points), len(positions), request.draws)
    windows = [_window(point, request.window, engine.info.n_layers) for point in points]
    needed = tuple(dict.fromkeys(point for window in windows for point in window))
    (clean,) = engine.capture(
        CaptureRequest(prompts=[prompt.ids], points=(EMBEDDING, *needed), logits="last")
    )
    assert clean.logits is not None
    logits = clean.logits[-1].double()
    token = int(logits.argmax())
    known = request.token is None
    if request.token is not None:
        token = chosen_token(engine, request.token, param="/token")
        known = token == int(logits.argmax())
    sigma = float(clean.states[EMBEDDING].double().std(correction=0))
    scale = request.noise * sigma
    drawn = [
        scale * noise_of(request.seed + n, len(subject), engine.info.d_model)
        for n in range(request.draws)
    ]
    elsewhere = _elsewhere(subject, len(prompt.ids), request.seed)
    runs = [Disturbed(subject, noise) for noise in drawn]
    runs += [Disturbed(elsewhere, noise[: len(elsewhere)]) for noise in drawn if elsewhere]
    bare = len(runs)
    for window in windows:
        for position in positions:
            rows = {point.layer: clean.states[point][position] for point in window}
            back = Restored(position, request.site, rows)
            runs += [Disturbed(subject, noise, back) for noise in drawn]
    found = chances(engine, prompt.ids, runs, token)
    groups = [tuple(found[n : n + request.draws]) for n in range(0, len(found), request.draws)]
    places = [(point.layer, position) for point in points for position in positions]
    cells = [
        TracedCell(layer=layer, position=position, restored=_mean(group), draws=group)
        for (layer, position), group in zip(places, groups[bare // request.draws :], strict=True)
    ]
    (text,) = token_texts(engine.tokenizer, [token])
    chance = float(logits.softmax(-1)[token])
    return TraceResult(
        model=engine.info.name,
        site=request.site,
        window=request.window,
        tokens=prompt.tokens,
        clean=TokenChance(token=text, id=token, probability=chance),
        known=known,
        sigma=sigma,
        noise=request.noise,
        corrupted=_disturbed(subject, groups[0]),
        elsewhere=_disturbed(elsewhere, groups[1]) if elsewhere else None,
        layers=tuple(point.layer for point in points),
        positions=positions,
        cells=tuple(cells),
    )


def _subject(engine: Engine, prompt: EncodedPrompt, request: TraceRequest) -> tuple[int, ...]:
    """The positions of the subject's tokens, sorted."""
    if isinstance(request.subject, str):
        found = prompt.positions_of(request.subject, param="/subject")
    else:
        places = enumerate(request.subject)
        found = [prompt.position(place, param=f"/subject/{n}") for n, place in places]
    positions = tuple(sorted(set(found)))
    # Each token's noise is a rule of its own, and what is put back is one more.
    most = engine.capabilities.limits.get("passes", len(positions) + 1) - 1
    if len(positions) > most:
        raise SpecError(
            f"the subject has {len(positions)} tokens, and noise can be put at {most} here: name a "
            "shorter piece of it",
            param="/subject",
            code="subject_too_long",
        )
    return positions


def _window(point: HookPoint, width: int, n_layers: int) -> tuple[HookPoint, ...]:
    start = max(point.layer - (width - 1) // 2, 0)
    return tuple(
        HookPoint(layer, point.site)
        for layer in range(start, min(point.layer + width // 2 + 1, n_layers))
    )


def _elsewhere(subject: tuple[int, ...], length: int, seed: int) -> tuple[int, ...]:
    """As many other positions as the subject has, or as there are, drawn always alike.

    The first one is left alone: in most models its state is like no other token's.
    """
    others = [n for n in range(1, length) if n not in subject]
    return tuple(sorted(random.Random(seed).sample(others, min(len(subject), len(others)))))


def _check_runs(layers: int, positions: int, draws: int) -> None:
    if layers * positions * draws > MAX_RUNS:
        raise TooLarge(
            f"{layers} layers × {positions} positions × {draws} draws of noise are "
            f"{layers * positions * draws:,} runs, more than the {MAX_RUNS:,} of one tracing: name "
            "fewer layers or positions, or lower 'draws'",
            code="answer_too_large",
            param="/positions",
        )


def _disturbed(positions: tuple[int, ...], draws: tuple[float, ...]) -> DisturbedChance:
    return DisturbedChance(positions=positions, probability=_mean(draws), draws=draws)


def _mean(draws: tuple[float, ...]) -> float:
    return float(torch.tensor(draws, dtype=torch.float64).mean())


def _possible(able: Capabilities) -> bool:
    return (
        reads_stream(able)
        and {"resid_pre", "resid_post"} <= set(able.captures) & set(able.sites)
        and {"add", "patch"} <= set(able.kinds)
    )


TRACE = Inspection(
    name="trace",
    summary="Which states bring an answer back when its subject is drowned in noise.",
    request=TraceRequest,
    result=TraceResult,
    run=trace,
    draw=trace_heat_map,
    possible=_possible,
)
