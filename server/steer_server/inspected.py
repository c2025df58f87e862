"""Carries out the `inspect` field of a completion."""

from __future__ import annotations

from typing import Any

from anyio import to_thread

from steer.engines.base import CaptureRequest
from steer.errors import SteerError
from steer.model_info import HookPoint
from steer_server.generation import Generation
from steer_server.inspect_spec import InspectSpec
from steer_server.state import Serving


async def inspected(serving: Serving, spec: InspectSpec, run: Generation) -> dict[str, Any]:
    """What `spec` reads from the first prompt of `run`, under its steering."""
    return await to_thread.run_sync(_logit_lens, serving, spec, run)


def _logit_lens(serving: Serving, spec: InspectSpec, run: Generation) -> dict[str, Any]:
    """Each layer's residual read by the final norm and output matrix (the logit lens)."""
    engine, prompt = serving.engine, run.prompts[0]
    for place in spec.positions:
        if not -len(prompt) <= place < len(prompt):
            raise SteerError(
                f"position {place} is outside the prompt, which has {len(prompt)} tokens",
                param="/inspect/positions",
                code="position_out_of_range",
            )
    layers = spec.layers or tuple(range(engine.info.n_layers))
    points = tuple(HookPoint(layer) for layer in layers)
    for point in points:
        engine.info.check_point(point, param="/inspect/layers")
    request = CaptureRequest(
        prompts=[prompt], points=points, positions=spec.positions, plans=[run.steering.plan]
    )
    captured = engine.capture(request)[0]
    return {
        "kind": spec.kind,
        "positions": [range(len(prompt))[place] for place in spec.positions],
        "layers": [
            {"layer": p.layer, "top": _top(serving, captured.states[p], spec.top)} for p in points
        ],
    }


def _top(serving: Serving, states: Any, count: int) -> list[list[dict[str, Any]]]:
    """The likeliest next tokens for each position, best first."""
    logprobs = serving.engine.unembed(states).float().log_softmax(dim=-1)
    best = logprobs.topk(min(count, logprobs.shape[-1]), dim=-1)
    decode = serving.engine.tokenizer.decode
    return [
        [
            {"token": decode([int(token)]), "id": int(token), "logprob": float(value)}
            for value, token in zip(values, tokens, strict=True)
        ]
        for values, tokens in zip(best.values, best.indices, strict=True)
    ]
