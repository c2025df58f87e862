"""Requests that read, among requests that do not, on the demo model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import demo_specs
import pytest
import vllm_engine
from readout_oracle import (
    SEVERAL,
    assert_read,
    expected,
    expected_kl,
    fed_tokens,
    reading,
    reading_library,
)
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


@contextmanager
def reading_engine(folder: Path, **options: Any) -> Iterator[VllmEngine]:
    """vLLM over a new registry in `folder` that holds `LIBRARY`; `options` are vLLM's."""
    with Registry.open(folder) as registry:
        register(registry)
    with vllm_engine.start_engine(folder, **options) as running:
        yield running


def crowd(
    engine: Engine, count: int, *, tokens: str | None = None, length: int | None = None
) -> list[Asked]:
    """Requests over all read-outs and steerings; every fifth reads nothing, unless `tokens` says
    what all of them read. Some prompts begin alike, so that there is something to find."""
    draw = random.Random(11)
    plans = [None if spec is None else plan_of(engine, LIBRARY, spec) for spec in STEERED]
    common = tuple(draw.randrange(3, 800) for _ in range(64))
    several = {name: _offered(engine, spec) for name, spec in SEVERAL.items()}
    several = {name: spec for name, spec in several.items() if spec}
    found = []
    for n in range(count):
        plan = plans[n % len(plans)]
        names: list[str | None] = [*several] if tokens else [*several, None]
        name = names[(n + 2) % len(names)]
        spec = None if name is None else several[name]
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


def _offered(engine: Engine, spec: Mapping[str, Any]) -> dict[str, Any]:
    """Of `spec` what the engine can read: a lens needs the head beside the layers."""
    return {name: one for name, one in spec.items() if name in engine.capabilities.readouts}


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


def compared(engine: Engine, asked: Sequence[Asked]) -> list[GenerationRequest]:
    """The steered ones of a crowd, each asking for `kl`, every second one for more."""
    found = []
    for n, one in enumerate(asked):
        request = one.request
        if request.plan is None:
            continue
        more = {"norms": [1], "tokens": "all"} if n % 2 else {}
        readouts = reading(engine, LIBRARY, {"kl": True, **more}, request.plan)
        found.append(replace(request, readouts=readouts))
    return found


def assert_all_compared(
    engine: Engine, asked: Sequence[GenerationRequest], answers: Sequence[Completion]
) -> None:
    """Every generated token has its divergence, the last too, beside what else is read."""
    largest = 0.0
    for request, done in zip(asked, answers, strict=True):
        tokens = (*request.prompt, *done.tokens)
        wanted = expected_kl(engine, tokens, len(request.prompt), request.plan)
        found = {one.position: one.kl for one in done.readouts if one.kl is not None}
        assert found == pytest.approx(wanted, abs=1e-4)
        largest = max(largest, *wanted.values())
        positions = [one.position for one in done.readouts]
        assert positions == sorted(set(positions))
        assert request.readouts is not None
        read = [one.position for one in done.readouts if one.numbers]
        assert read == (list(range(len(tokens) - 1)) if request.readouts.readers else [])
    assert largest > 0.01


def forgotten(engine: VllmEngine) -> bool:
    """Whether the worker keeps nothing of what was read."""
    requests = steering(engine).requests
    return not (requests._readouts or requests._kept or requests._records)
