"""Adapters (LoRA) of vLLM's beside steering: the model and its adapters in one batch, each request
steered by a spec of its own, against the transformers engine with the adapter in its weights.

In every form, on one worker and on two that split the model; workers of the form for CUDA graphs
have their kernel interpreted, in processes of their own.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_specs
import pytest
import torch
import vllm_engine
from inside_answers import assert_near, matrices
from lora_adapters import write_adapter, write_merged
from vllm_engine import Plans

from steer.engines.base import CaptureRequest, Completion, GenerationRequest, Receipt
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.offline import Steered
from steer.model import HookPoint
from steer.registry.registry import Registry

SPECS = (
    "unsteered",
    "everything",
    "generation only",
    "a prompt gate",
    "a token gate on every later layer",
    "a clamp",
    "a clamp that competes",
    "norm preserved",
    "ablate at attn_out",
    "add at mlp_out",
    "add at head_out",
    "norm preserved at mlp_act",
    "ablate at attn_in",
    "low rank at mlp_in",
)
NAMES = (None, "one", "two")
"""The model itself, and its adapters."""
STATIC = {"form": "static", "sites": ["attn_in", "mlp_in"]}
"""Inside graphs two workers gather nothing, so there the other two sites stay shut."""
ENGINES: dict[str, dict[str, Any]] = {
    "in Python": {},
    "static": {"distributed_executor_backend": "mp", "additional_config": {"steer": STATIC}},
    "split": {"tensor_parallel_size": 2},
    "split, static": {"tensor_parallel_size": 2, "additional_config": {"steer": STATIC}},
}
SLOTS = 3
"""One more than adapters: on a CPU, vLLM gives rows without an adapter the one in the last slot."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The adapters, and the model that each is merged into."""
    root = tmp_path_factory.mktemp("lora")
    for seed, name in enumerate(NAMES[1:]):
        assert name is not None
        adapter = write_adapter(root / name, vllm_engine.DEMO_MODEL, seed=seed)
        write_merged(root / f"{name}-merged", vllm_engine.DEMO_MODEL, adapter)
    return root


@pytest.fixture(scope="module", params=ENGINES)
def steered(registry: Path, request: pytest.FixtureRequest) -> Iterator[Steered]:
    os.environ["STEER_REGISTRY"] = str(registry)
    from vllm import LLM

    options = vllm_engine.OPTIONS | vllm_engine.ALL_SITES | ENGINES[request.param]
    llm = LLM(**options, enable_lora=True, max_loras=SLOTS, max_lora_rank=8)
    with Registry.open(registry) as opened:
        yield Steered(llm, library=opened)
    llm.llm_engine.engine_core.shutdown()


@pytest.fixture(scope="module")
def plans(steered: Steered) -> Plans:
    every = vllm_engine.plans_for(steered.engine)
    return {name: every[name] for name in SPECS if name in every}


@pytest.fixture(scope="module")
def requests(plans: Plans) -> list[tuple[str | None, GenerationRequest]]:
    """Each spec with the model and with both adapters, in a mixed order."""
    found = demo_specs.requests_for(plans, 3 * len(plans), seed=2, longest=20)
    counts: dict[str, int] = {}
    named = []
    for request in found:
        spec = request.id.partition(" ")[2]
        counts[spec] = counts.get(spec, -1) + 1
        named.append((NAMES[counts[spec]], request))
    return named


def adapters(folder: Path, name: str | None) -> Any:
    from vllm.lora.request import LoRARequest

    return None if name is None else LoRARequest(name, NAMES.index(name), str(folder / name))


def run(
    steered: Steered, folder: Path, requests: list[tuple[str | None, GenerationRequest]]
) -> list[tuple[list[int], list[float], Receipt | None]]:
    """Tokens, their log-probabilities and the receipt of each, all in one batch."""
    from vllm import SamplingParams

    prompts, params = [], []
    for _, request in requests:
        ticket = None
        if request.plan is not None:
            ticket = steered.engine.tickets.issue(request.plan, measure=request.measure)
        prompts.append({"prompt_token_ids": list(request.prompt)})
        params.append(
            SamplingParams(
                max_tokens=request.sampling.max_tokens,
                temperature=0,
                logprobs=1,
                ignore_eos=True,
                detokenize=False,
                extra_args=None if ticket is None else ticket.as_extra_args(),
            )
        )
    asked = [adapters(folder, name) for name, _ in requests]
    outputs = steered._llm.generate(prompts, params, lora_request=asked, use_tqdm=False)
    receipts = steered.receipts(outputs, params)
    return [
        (
            list(output.outputs[0].token_ids),
            [
                places[token].logprob
                for token, places in zip(
                    output.outputs[0].token_ids, output.outputs[0].logprobs, strict=True
                )
            ],
            receipt,
        )
        for output, receipt in zip(outputs, receipts, strict=True)
    ]


def expected(
    folder: Path, requests: list[tuple[str | None, GenerationRequest]]
) -> list[Completion]:
    """What the transformers engine makes of them, with the adapters in its weights."""
    found: dict[str, Completion] = {}
    for name in NAMES:
        model = vllm_engine.DEMO_MODEL if name is None else folder / f"{name}-merged"
        mine = [request for one, request in requests if one == name]
        with TransformersEngine.load(model, name="steer-demo") as engine:
            found |= {
                request.id: done for request, done in zip(mine, engine.complete(mine), strict=True)
            }
    return [found[request.id] for _, request in requests]


def test_every_request_is_steered_with_its_own_adapter(
    steered: Steered, folder: Path, requests: list[tuple[str | None, GenerationRequest]]
) -> None:
    pairs = zip(requests, run(steered, folder, requests), expected(folder, requests), strict=True)
    for (adapter, request), (tokens, logprobs, receipt), wanted in pairs:
        name = f"{request.id} with {adapter}"
        assert tokens == list(wanted.tokens), name
        theirs = [one.logprob for one in wanted.logprobs]
        assert logprobs == pytest.approx(theirs, abs=1e-3), name
        mine, other = (one if one is None else one.as_json() for one in (receipt, wanted.receipt))
        if mine is not None:
            mine["tokens_cached"] = 0  # the reference has no cache
        assert vllm_engine.plain(mine) == vllm_engine.plain(other), name


def test_adapters_and_specs_both_part_the_cache(
    steered: Steered, folder: Path, plans: Plans
) -> None:
    """One long prompt, asked with every adapter and spec in turn, and all of it once more: only the
    second time is anything cached, and no answer changes."""
    steered._llm.reset_prefix_cache()
    prompt = tuple(range(100, 200))
    base = demo_specs.requests_for({"x": None}, 1)[0]
    sampling = replace(base.sampling, max_tokens=4)
    asked = [
        (adapter, GenerationRequest(f"{spec} {adapter}", prompt, sampling, plans[spec]))
        for adapter in NAMES
        for spec in ("everything", "ablate at attn_in")
    ]
    first, second = ([run(steered, folder, [one])[0] for one in asked] for _ in range(2))
    for (_, request), one, again in zip(asked, first, second, strict=True):
        assert one[2] is not None
        assert again[2] is not None
        assert one[2].tokens_cached == 0, request.id
        assert again[2].tokens_cached > 0, request.id
        assert one[0] == again[0]
        assert replace(again[2], tokens_cached=0) == one[2]


def run_adapters(
    steered: Steered, folder: Path, requests: list[tuple[str | None, GenerationRequest]]
) -> None:
    """The last batch that the worker knows is one of adapters alone."""
    run(steered, folder, [one for one in requests if one[0] is not None][:5])


def test_heads_and_neurons_looked_at_after_a_batch_with_adapters_are_the_models_own(
    steered: Steered, folder: Path, requests: list[tuple[str | None, GenerationRequest]]
) -> None:
    """Where the sites are shut, queries and keys alone, which need none."""
    run_adapters(steered, folder, requests)
    with TransformersEngine.load(vllm_engine.DEMO_MODEL, name="steer-demo") as reference:
        if "head_out" in steered.engine.info.sites:
            assert_near(matrices(steered.engine), matrices(reference), 1e-3)
        states = torch.randn(70, 192, generator=torch.Generator().manual_seed(6))
        for layer in (0, 5):
            mine, other = (
                one.queries_and_keys(layer, states) for one in (steered.engine, reference)
            )
            torch.testing.assert_close(mine.queries, other.queries, rtol=1e-3, atol=1e-3)
            torch.testing.assert_close(mine.keys, other.keys, rtol=1e-3, atol=1e-3)


def test_states_read_after_a_batch_with_adapters_are_the_models_own(
    steered: Steered, folder: Path, requests: list[tuple[str | None, GenerationRequest]]
) -> None:
    run_adapters(steered, folder, requests)
    points = (HookPoint(2, steered.engine.info.sites[-2]), HookPoint(5))
    request = CaptureRequest(((5, 9, 200, 31), (7,)), points, logits="all")
    with TransformersEngine.load(vllm_engine.DEMO_MODEL, name="steer-demo") as engine:
        wanted = engine.capture(request)
    for mine, other in zip(steered.engine.capture(request), wanted, strict=True):
        assert mine.logits is not None
        assert other.logits is not None
        torch.testing.assert_close(mine.logits, other.logits, rtol=1e-3, atol=1e-3)
        for point in points:
            torch.testing.assert_close(
                mine.states[point], other.states[point], rtol=1e-3, atol=1e-3
            )
