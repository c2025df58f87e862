"""The form for CUDA graphs on the stages of a pipeline, each in a process of its own.

Gates that read in the first stage rule what the second does; TopK clamps and captures are on both.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported, by the workers too

import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import vllm_engine
from shallow_model import BRIEF, LATENTS
from vllm_contract import assert_same
from vllm_engine import Plans

from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine

RANKED = 64
"""For how many tokens a step inside a graph has room to rank latents."""


@pytest.fixture(scope="module")
def engine(model: Path, registry: Path) -> Iterator[VllmEngine]:
    own = {"form": "static", "latents_at_once": LATENTS * RANKED}
    with vllm_engine.start_engine(
        registry,
        model=str(model),
        pipeline_parallel_size=2,
        additional_config={"steer": own},
        max_num_batched_tokens=64,
        max_num_seqs=16,
    ) as running:
        yield running
    running._driver.llm.llm_engine.engine_core.shutdown()  # type: ignore[attr-defined]


def requests_for(plans: Plans) -> list[GenerationRequest]:
    """Two for each spec, of which one asks for sizes."""
    draw, found = random.Random(6), []
    for n, (name, plan) in enumerate([*plans.items()] * 2):
        prompt = tuple(draw.randrange(3, BRIEF.vocabulary) for _ in range(draw.randint(1, 16)))
        told = draw.randint(1, BRIEF.longest_answer)
        sampling = SamplingParams(max_tokens=told, temperature=0, logprobs=2, ignore_eos=True)
        measure = n >= len(plans)
        found.append(GenerationRequest(f"{n} {name}", prompt, sampling, plan, measure=measure))
    draw.shuffle(found)
    return found


def test_mixed_requests_are_those_of_one_worker(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    requests = requests_for(plans)
    assert sum(one.plan is not None and one.plan.gated for one in requests) >= 16
    mine, other = engine.complete(requests), reference.complete(requests)
    for request, a, b in zip(requests, mine, other, strict=True):
        assert_same(a, b, request.id)
    assert engine.stats().slots_in_use == 0


def test_states_of_both_stages_are_read(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    every = list(plans.values())
    prompts = [tuple(range(5 + n, 15 + n)) for n in range(len(every))]
    asked = CaptureRequest(prompts, BRIEF.points, plans=every, logits="last")
    for mine, other in zip(engine.capture(asked), reference.capture(asked), strict=True):
        for point in BRIEF.points:
            torch.testing.assert_close(
                mine.states[point], other.states[point], rtol=1e-4, atol=1e-4
            )
        torch.testing.assert_close(mine.logits, other.logits, rtol=1e-4, atol=1e-4)
