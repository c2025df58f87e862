"""What looks into attention and MLP gives on vLLM what it gives in the transformers engine.

Each file of `tests/vllm/inspection` gives its own `engine` and takes these tests in.
"""

from __future__ import annotations

import random
from itertools import combinations, product
from typing import Any, cast

import demo_specs
import pytest
import torch
from artefacts import random_probe
from inside_answers import assert_near, looked_at
from vllm_engine import Plans
from vllm_simulation import assert_all_free, steering

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.engines.vllm.inside import layers as inside
from steer.engines.vllm.inside.weights import AttentionForm
from steer.errors import IncompatibleArtefact, SteerError, TooLarge, Unsupported
from steer.fit import SaidText, fit_concepts, said_texts
from steer.inspection import (
    AttributionRequest,
    AttributionResult,
    ConceptsRequest,
    FlowRequest,
    FlowResult,
    TraceRequest,
    attribution,
    concepts,
    flow,
    trace,
)
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import Site

FACT = {"text": "The capital of France is"}
CLOSE = 1e-4
LAYERS = tuple(range(demo_specs.LAYERS))
PUSH = demo_specs.one(demo_specs.add("v0"))


def plans_of(engine: Any) -> PlanCache:
    return PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities)


def prompt(length: int, seed: int) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(3, demo_specs.VOCABULARY) for _ in range(length))


def both(
    engine: VllmEngine, reference: TransformersEngine, request: CaptureRequest
) -> list[tuple[Any, Any]]:
    return list(zip(engine.capture(request), reference.capture(request), strict=True))


def close(mine: Any, other: Any) -> None:
    torch.testing.assert_close(mine, other, rtol=CLOSE, atol=CLOSE)


def test_output_projections_are_asked_as_they_are(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    able = engine.capabilities
    assert able.projections
    assert able.attention
    generator = torch.Generator().manual_seed(2)
    for site in able.projections:
        width = reference.info.width(site)
        states = torch.randn(2, 3, width, generator=generator)
        for layer in (0, 5):
            point = HookPoint(layer, site)
            close(engine.project(point, states), reference.project(point, states))
            nothing = torch.zeros(1, width)
            close(engine.project(point, nothing), reference.project(point, nothing))
    with pytest.raises(Unsupported, match="not of 'attn_out'") as caught:
        engine.project(HookPoint(1, "attn_out"), torch.zeros(1, engine.info.d_model))
    assert caught.value.code == "no_projection"
    with pytest.raises(IncompatibleArtefact, match="layer 6 is out of range"):
        engine.project(HookPoint(6, able.projections[0]), torch.zeros(1, 1))


@pytest.mark.parametrize("against", [None, " London"])
def test_heads_and_neurons_have_the_shares_of_the_reference(
    engine: VllmEngine, reference: TransformersEngine, against: str | None
) -> None:
    asked: dict[str, Any] = {**FACT, "token": " Paris", "heads": True, "neurons": 8}
    request = AttributionRequest.model_validate({**asked, "against": against})
    assert_same_parts(attribution(engine, request), attribution(reference, request))


def test_heads_of_a_steered_state_have_the_shares_of_the_reference(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    asked: dict[str, Any] = {**FACT, "heads": True, "neurons": 3, "steering": PUSH}
    request = AttributionRequest.model_validate(asked)
    mine, other = (attribution(one, request, plans=plans_of(one)) for one in (engine, reference))
    assert mine.fingerprint == other.fingerprint
    assert_same_parts(mine, other)


def assert_same_parts(mine: AttributionResult, other: AttributionResult) -> None:
    """And they sum to what they are parts of."""
    assert mine.token.id == other.token.id
    assert mine.logit == pytest.approx(other.logit, abs=CLOSE)
    assert mine.unexplained == pytest.approx(0.0, abs=CLOSE)
    for one, wanted in zip(mine.layers, other.layers, strict=True):
        assert one.heads is not None
        assert one.heads == pytest.approx(wanted.heads, abs=CLOSE)
        for name in ("attention", "mlp", "rest", "head_bias"):
            assert getattr(one, name) == pytest.approx(getattr(wanted, name), abs=CLOSE), name
        assert sum(one.heads) + (one.head_bias or 0) == pytest.approx(one.attention, abs=CLOSE)
        assert one.head_bias == pytest.approx(0.0, abs=CLOSE)
    neurons = [
        {(one.layer, one.neuron): one for one in result.neurons or ()} for result in (mine, other)
    ]
    assert neurons[0].keys() == neurons[1].keys()
    for name, neuron in neurons[0].items():
        assert neuron.share == pytest.approx(neurons[1][name].share, abs=CLOSE)
        assert neuron.activation == pytest.approx(neurons[1][name].activation, abs=CLOSE)


def test_a_tracing_puts_back_what_the_reference_puts_back(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    asked = {**FACT, "subject": "France", "token": " Paris", "layers": [0, 3, 5], "draws": 2}
    request = TraceRequest.model_validate(asked)
    mine, other = trace(engine, request), trace(reference, request)
    assert mine.clean.probability == pytest.approx(other.clean.probability, abs=CLOSE)
    assert mine.corrupted.probability == pytest.approx(other.corrupted.probability, abs=CLOSE)
    assert other.clean.probability > other.corrupted.probability + 0.1
    pairs = list(zip(mine.cells, other.cells, strict=True))
    for one, wanted in pairs:
        assert (one.layer, one.position) == (wanted.layer, wanted.position)
        assert one.draws == pytest.approx(wanted.draws, abs=1e-3)
    assert len({round(wanted.restored, 2) for _, wanted in pairs}) > 2


def test_concepts_are_read_by_name_as_the_reference_reads_them(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    """By a probe that was never taught, whose codes are the states', and by one fitted here."""
    places = (("France", "Paris"), ("Italy", "Rome"), ("Spain", "Madrid"))
    said = said_texts(
        [
            SaidText.model_validate(
                {"text": f"{opening}{name} is", "pairs": {"country": name, "city": city}}
            )
            for opening in ("The capital of ", "Tell me what ", "I wonder what ", "So ")
            for name, city in places
        ]
    )
    fitted = fit_concepts(engine, said, name="fitted", layers=[1, 4], dimensions=256)
    assert fitted.form.measures is not None
    drawn = random_probe(5, 2, 4, 5, width=engine.info.d_model)
    library = MemoryLibrary(probes={"fitted": fitted, "drawn": drawn})
    prompts = [FACT, {"text": "The capital of Spain is"}, {"tokens": prompt(30, 1)}]
    for name, position in (("fitted", -1), ("drawn", 2)):
        request = ConceptsRequest.model_validate(
            {"probe": name, "prompts": prompts, "position": position}
        )
        mine, other = (concepts(one, request, library=library) for one in (engine, reference))
        assert mine.probe == other.probe
        for here, there in zip(mine.readings, other.readings, strict=True):
            assert (here.token, here.position) == (there.token, there.position)
            for role, wanted in zip(here.roles, there.roles, strict=True):
                cosines = [{f.filler: f.cosine for f in one.fillers} for one in (role, wanted)]
                shared = cosines[0].keys() & cosines[1].keys()
                assert shared
                # A channel near 0 may have the other sign: 1 of 256 is .008.
                for filler in shared:
                    assert cosines[0][filler] == pytest.approx(cosines[1][filler], abs=0.02)


@pytest.mark.parametrize("steered", [False, True])
def test_a_flow_has_the_edges_of_the_reference(
    engine: VllmEngine, reference: TransformersEngine, *, steered: bool
) -> None:
    asked: dict[str, Any] = {**FACT, "edges": 512}
    if steered:
        asked["steering"] = PUSH
    request = FlowRequest.model_validate(asked)
    mine, other = (flow(one, request, plans=plans_of(one)) for one in (engine, reference))
    assert_same_edges(mine, other)


def assert_same_edges(mine: FlowResult, other: FlowResult, tolerance: float = CLOSE) -> None:
    edges = [
        {(one.layer, one.head, one.reads, one.position): one for one in result.edges}
        for result in (mine, other)
    ]
    assert edges[0].keys() == edges[1].keys()
    for name, edge in edges[0].items():
        wanted = edges[1][name]
        for field in ("weight", "share", "norm"):
            assert getattr(edge, field) == pytest.approx(getattr(wanted, field), abs=tolerance), (
                name,
                field,
            )
    for one, wanted_token in zip(mine.followed, other.followed, strict=True):
        assert one.token.id == wanted_token.token.id
        assert one.unexplained == pytest.approx(0.0, abs=tolerance)
        for layer in one.layers:
            into = sum(edge.share for edge in mine.edges if edge.layer == layer.layer)
            told = into + layer.left_out + layer.bias
            assert told == pytest.approx(layer.attention, abs=tolerance)
    assert {one.id for one in mine.nodes} == {one.id for one in other.nodes}


def test_attention_is_told_of_prompts_in_pieces_beside_other_requests(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    """Longer than a step, of several requests in one, steered and not, while others generate."""
    prompts = [prompt(length, length) for length in (150, 7, 90, 1, 40, 33)]
    names = ["unsteered", "everything", "a window", "unsteered", "a token gate", "ablate"]
    chosen = [plans.get(name) for name in names]
    assert sum(plan is not None for plan in chosen) >= 3
    points = (HookPoint(1, "head_out"), HookPoint(4, "head_out"), HookPoint(5))
    request = CaptureRequest(prompts, points, plans=chosen, attention=(1, 4))
    sampling = SamplingParams(max_tokens=30, temperature=0, ignore_eos=True)
    listeners = [
        GenerationRequest(str(n), prompt(20 + n, n), sampling, plans["everything"])
        for n in range(3)
    ]
    done = engine.complete(listeners)
    told = both(engine, reference, request)
    for mine, other in told:
        assert mine.attention.keys() == other.attention.keys() == {1, 4}
        for layer in (1, 4):
            close(mine.attention[layer].weights, other.attention[layer].weights)
            close(mine.attention[layer].values, other.attention[layer].values)
            one = mine.attention[layer]
            made = (one.weights @ one.values).transpose(0, 1).flatten(1)
            close(made, mine.states[HookPoint(layer, "head_out")])
        for point in points:
            close(mine.states[point], other.states[point])
    again = engine.complete(listeners)
    assert [one.tokens for one in again] == [one.tokens for one in done]
    assert_all_free(engine)
    for module in steering(engine).attention.layers.values():
        assert "forward" not in vars(module.impl)


def test_some_positions_some_layers_and_no_states_are_told(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    prompts = [prompt(12, 1), prompt(1, 2)]
    whole = engine.capture(CaptureRequest(prompts, attention=(0, 3, 3)))
    for mine, ids in zip(whole, prompts, strict=True):
        assert mine.attention.keys() == {0, 3}
        weights = mine.attention[3].weights
        assert weights.shape == (6, len(ids), len(ids))
        close(weights.sum(-1), torch.ones(6, len(ids)))
        assert weights.triu(1).abs().max() == 0.0
        assert not mine.states
    request = CaptureRequest(prompts[:1], (HookPoint(2),), (-1, 3), logits="last", attention=(3,))
    ((mine, other),) = both(engine, reference, request)
    close(mine.attention[3].weights, whole[0].attention[3].weights[:, [-1, 3]])
    close(mine.attention[3].weights, other.attention[3].weights)
    close(mine.logits, other.logits)
    with pytest.raises(IncompatibleArtefact, match="layer 6 is out of range"):
        engine.capture(CaptureRequest(prompts, attention=(6,)))


def test_an_attention_that_does_something_else_is_refused(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights that are not those which the kernel used are not told."""
    request = CaptureRequest([prompt(20, 3)], attention=(2,))
    for wrong in (
        AttentionForm(1.0),
        AttentionForm(32**-0.5, window=4),
        AttentionForm(32**-0.5, cap=0.5),
        AttentionForm(32**-0.5, sinks=torch.zeros(6)),
        AttentionForm(32**-0.5, slopes=torch.full((6,), 0.1)),
    ):
        monkeypatch.setattr(AttentionForm, "of", lambda _, one=wrong: one)
        with pytest.raises(Unsupported, match="attention of layer 2 makes") as caught:
            engine.capture(request)
        assert caught.value.code == "no_attention"
    monkeypatch.setattr(AttentionForm, "of", lambda _: AttentionForm(32**-0.5))
    assert engine.capture(request)[0].attention.keys() == {2}


def test_a_layer_without_such_an_attention_is_named(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = steering(engine).attention
    fewer = {n: one for n, one in known.layers.items() if n != 4}
    monkeypatch.setattr(known, "layers", fewer)
    assert not known.complete
    with pytest.raises(Unsupported, match="attention of layer 4 is not one of vLLM's") as caught:
        engine.capture(CaptureRequest([prompt(5, 1)], attention=(3, 4)))
    assert caught.value.code == "no_attention"


def test_a_layer_that_attends_with_the_keys_of_another_is_named(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    take = inside.AttentionNotes.take

    def lacking(self: Any, layer: int, start: int, rows: Any) -> None:
        take(self, layer, start, {**rows, "key": None, "value": None})

    monkeypatch.setattr(inside.AttentionNotes, "take", lacking)
    with pytest.raises(Unsupported, match="layer 1 is handed no key, value of its own") as caught:
        engine.capture(CaptureRequest([prompt(5, 1)], attention=(1,)))
    assert caught.value.code == "no_attention"


def test_more_than_a_message_holds_is_refused(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("steer.engines.vllm.front.capturing.MAX_CAPTURE_BYTES", 1 << 16)
    request = CaptureRequest([prompt(60, 1)], (HookPoint(0),), (-1,), attention=LAYERS)
    with pytest.raises(TooLarge, match="what 6 layers attend to, are"):
        engine.capture(request)


def test_queries_and_keys_are_those_of_the_reference(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    """Asked for between the steps of a request that is steered, which goes on as it was."""
    states = torch.randn(70, engine.info.d_model, generator=torch.Generator().manual_seed(6))
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    request = GenerationRequest("beside", prompt(9, 9), sampling, plans["everything"])
    (before,) = engine.complete([request])
    for layer in (0, 3, 5):
        mine, other = (one.queries_and_keys(layer, states) for one in (engine, reference))
        close(mine.queries, other.queries)
        close(mine.keys, other.keys)
    (after,) = engine.complete([request])
    assert after.tokens == before.tokens
    assert after.receipt == before.receipt
    with pytest.raises(IncompatibleArtefact, match="layer 6 is out of range"):
        engine.queries_and_keys(6, states)
    for module in steering(engine).attention.layers.values():
        assert "forward" not in vars(module.impl)


def test_blocks_by_themselves_make_what_the_reference_makes(
    engine: VllmEngine, reference: TransformersEngine, plans: Plans
) -> None:
    """Between each two hook points of a block, more states than fit into a pass, and the request
    beside it goes on as it was."""
    generator = torch.Generator().manual_seed(7)
    sampling = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True)
    request = GenerationRequest("beside", prompt(9, 9), sampling, plans["everything"])
    (before,) = engine.complete([request])
    carried = 0
    for layer, (start, end) in product((0, 3, 5), combinations(engine.info.sites, 2)):
        source, target = HookPoint(layer, start), HookPoint(layer, end)
        states = torch.randn(70, engine.info.width(start), generator=generator)
        try:
            wanted = reference.carry(source, target, states)
        except Unsupported:
            with pytest.raises(Unsupported, match="the stream passes by") as caught:
                engine.carry(source, target, states)
            assert caught.value.code == "cannot_carry"
            continue
        close(engine.carry(source, target, states), wanted)
        close(engine.carry(source, target, states[:2], range(3, 8)), wanted[:2, 3:8])
        carried += 1
    assert carried >= 3 * 11
    (after,) = engine.complete([request])
    assert (after.tokens, after.receipt) == (before.tokens, before.receipt)
    assert_all_free(engine)
    for module in steering(engine).attention.layers.values():
        assert "forward" not in vars(module.impl)


def test_neurons_and_heads_are_the_tokens_of_the_reference(
    engine: VllmEngine, reference: TransformersEngine
) -> None:
    assert_near(looked_at(engine), looked_at(reference), CLOSE)


def test_a_block_that_does_something_else_by_itself_is_refused(
    engine: VllmEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was proved before is not asked again, so the layer is one of which nothing was."""
    ends = HookPoint(1, "resid_pre"), HookPoint(1, "head_out")
    states = torch.ones(2, engine.info.d_model)
    halved = AttentionForm.alone
    monkeypatch.setattr(AttentionForm, "alone", lambda *args: 0.5 * halved(*args))
    with pytest.raises(Unsupported, match=r"makes at 1\.head_out of 1\.resid_pre") as caught:
        engine.carry(*ends, states)
    assert caught.value.code == "cannot_carry"
    monkeypatch.undo()
    assert engine.carry(*ends, states).shape == (2, engine.info.width("head_out"))


def refusal(engine: Any, site: Site) -> SteerError:
    """Of a flow, or of heads or neurons, where `site` is closed."""
    fields: dict[str, Any] = {"heads": True} if site == "head_out" else {"neurons": 3}
    with pytest.raises(Unsupported) as caught:
        attribution(engine, AttributionRequest.model_validate({**FACT, **fields}))
    return cast("SteerError", caught.value)
