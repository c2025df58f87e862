"""Requests that read, among requests that do not, on the demo model."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import demo_specs
from readout_oracle import SEVERAL, assert_read, expected, fed_tokens, reading, reading_library
from readout_oracle import steering as plan_of
from vllm_simulation import steering

from steer.engines.base import Completion, Engine, GenerationRequest, SamplingParams
from steer.engines.vllm.front.engine import VllmEngine
from steer.registry.registry import Registry

LIBRARY = reading_library(demo_specs.WIDTH, demo_specs.LAYERS)
STEERED: Sequence[dict[str, Any] | None] = (
    None,
    {"interventions": [{"kind": "add", "vector": "v0", "layers": [0, 3], "strength": 0.4}]},
    {"interventions": [{"kind": "ablate", "vector": "v1", "layers": [1, 4]}]},
)


@dataclass(frozen=True)
class Asked:
    """A request and what it reads: `spec`, or nothing."""

    request: GenerationRequest
    spec: dict[str, Any] | None


def register(registry: Registry) -> None:
    """Puts the artefacts of `LIBRARY` where the workers find them."""
    for kind in (LIBRARY.vectors, LIBRARY.saes, LIBRARY.lenses):
        for name, artefact in kind.items():
            registry.add(name, artefact)


def crowd(
    engine: Engine, count: int, *, tokens: str | None = None, length: int | None = None
) -> list[Asked]:
    """Requests over all read-outs and steerings; every fifth reads nothing, unless `tokens` says
    what all of them read. Some prompts begin alike, so that there is something to find."""
    draw = random.Random(11)
    plans = [None if spec is None else plan_of(engine, LIBRARY, spec) for spec in STEERED]
    common = tuple(draw.randrange(3, 800) for _ in range(64))
    found = []
    for n in range(count):
        plan = plans[n % len(plans)]
        names: list[str | None] = [*SEVERAL] if tokens else [*SEVERAL, None]
        name = names[(n + 2) % len(names)]
        spec = None if name is None else SEVERAL[name]
        read = tokens or ("all", "generated", "prompt")[n // 2 % 3]
        size = length or draw.randint(1, 90)
        prompt = (common if n % 4 == 0 else ()) + tuple(draw.randrange(3, 800) for _ in range(size))
        found.append(
            Asked(
                GenerationRequest(
                    str(n),
                    prompt,
                    SamplingParams(max_tokens=draw.randint(2, 30), temperature=0, ignore_eos=True),
                    plan,
                    readouts=None
                    if spec is None
                    else reading(engine, LIBRARY, {**spec, "tokens": read}, plan),
                ),
                spec,
            )
        )
    return found


def assert_all_read(engine: Engine, asked: Sequence[Asked], answers: Sequence[Completion]) -> None:
    for one, done in zip(asked, answers, strict=True):
        request = one.request
        if one.spec is None or request.readouts is None:
            assert done.readouts == ()
            continue
        tokens = fed_tokens(request, done, None)
        wanted = expected(engine, LIBRARY, one.spec, tokens, request.plan)
        first, end = request.readouts.wanted(len(request.prompt))
        assert_read(done, wanted, tokens, first, min(end, len(tokens)))


def forgotten(engine: VllmEngine) -> bool:
    """Whether the worker keeps nothing of what was read."""
    requests = steering(engine).requests
    return not (requests._readouts or requests._kept or requests._records)
