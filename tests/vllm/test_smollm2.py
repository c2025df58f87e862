"""The engines agree on a real model, SmolLM2-135M-Instruct in float32."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import takewhile

import pytest
import torch
import vllm_engine
from smollm2 import smollm2_folder
from smollm2_specs import LAYERS, LIBRARY, compiled, requests_for

from steer.engines.base import CaptureRequest, Completion
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.inspection import AttributionRequest, FlowRequest, attribution, flow
from steer.model import HookPoint
from steer.registry.registry import Registry

pytestmark = pytest.mark.slow

TIE = 0.02
"""Two tokens whose log-probabilities differ by less may come in either order."""


@pytest.fixture(scope="module")
def engines(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[VllmEngine, TransformersEngine]]:
    folder = tmp_path_factory.mktemp("registry")
    with Registry.open(folder) as registry:
        for name, vector in LIBRARY.vectors.items():
            registry.add(name, vector)
        for name, sae in LIBRARY.saes.items():
            registry.add(name, sae)
    location = str(smollm2_folder())
    with (
        TransformersEngine.load(location, device="cpu", dtype="float32") as reference,
        vllm_engine.start_engine(
            folder, model=location, max_num_seqs=8, **vllm_engine.ALL_SITES
        ) as running,
    ):
        yield running, reference


def test_greedy_answers_are_the_same(engines: tuple[VllmEngine, TransformersEngine]) -> None:
    running, reference = engines
    mine = running.complete(requests_for(running, compiled(running)))
    other = reference.complete(requests_for(reference, compiled(reference)))
    for a, b, name in zip(mine, other, compiled(reference), strict=True):
        assert _same_up_to_a_tie(a, b), (name, a.tokens, b.tokens)


def test_heads_neurons_and_edges_are_the_same(
    engines: tuple[VllmEngine, TransformersEngine],
) -> None:
    """Of a fact whose answer comes from its subject through one head."""
    fact = {"text": "The capital of France is"}
    whole = AttributionRequest.model_validate({**fact, "heads": True, "neurons": 10})
    mine, other = (attribution(engine, whole) for engine in engines)
    assert mine.token.id == other.token.id
    for one, wanted in zip(mine.layers, other.layers, strict=True):
        assert one.heads == pytest.approx(wanted.heads, abs=1e-4)
    assert [(one.layer, one.neuron) for one in mine.neurons or ()] == [
        (one.layer, one.neuron) for one in other.neurons or ()
    ]
    edges = [
        {(one.layer, one.head, one.reads): one for one in flow(engine, request).edges}
        for engine in engines
        for request in [FlowRequest.model_validate({**fact, "edges": 100})]
    ]
    assert edges[0].keys() == edges[1].keys()
    for name, edge in edges[0].items():
        assert edge.weight == pytest.approx(edges[1][name].weight, abs=1e-4)
        assert edge.share == pytest.approx(edges[1][name].share, abs=1e-4)


def _same_up_to_a_tie(mine: Completion, other: Completion) -> bool:
    pairs = zip(mine.tokens, other.tokens, strict=False)
    equal = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
    if equal == len(mine.tokens) == len(other.tokens):
        return mine.finish == other.finish and bool(mine.receipt) == bool(other.receipt)
    best = [chance for _, chance in other.logprobs[equal].top[:2]]
    return abs(best[0] - best[1]) < TIE


def test_states_are_the_same(engines: tuple[VllmEngine, TransformersEngine]) -> None:
    running, reference = engines
    points = tuple(HookPoint(layer) for layer in (0, *LAYERS, 29))
    request = requests_for(reference, compiled(reference))[1]
    for name in ("unsteered", "add", "clamp"):
        mine, other = (
            one.capture(CaptureRequest([request.prompt], points, (-1,), [compiled(one)[name]]))[0]
            for one in (running, reference)
        )
        for point in points:
            far = (mine.states[point] - other.states[point]).norm()
            assert far < 1e-3 * other.states[point].norm(), (name, point)
    assert torch.get_num_threads() == 1
