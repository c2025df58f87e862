"""The packed form of the transformers engine gives what the rolling form gives.

Both run the same requests over the same random model; tokens, log-probabilities and receipts are
compared. Caches are small, so that prompts are chunked and sequences are put back.
"""

from __future__ import annotations

import copy
import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from artefacts import artefacts, random_spec
from tiny_models import ARCHITECTURES, LAYERS, VOCABULARY, WIDTH
from together import complete_together
from transformers.generation.configuration_utils import CompileConfig
from transformers.generation.continuous_batching import input_outputs

from steer.artefacts.library import MemoryLibrary
from steer.batch.ledger import Ledger
from steer.engines.base import (
    CaptureRequest,
    Completion,
    GenerationRequest,
    Receipt,
    SamplingParams,
)
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.packed import model as packed_model
from steer.engines.transformers.packed.model import KNOWN_SERIES, check_transformers
from steer.errors import EngineError, SteerError, Unsupported
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

MADE = artefacts(WIDTH, LAYERS)
ADD = {"interventions": [{"kind": "add", "vector": "v0", "strength": 1.5}]}
GATED = {**ADD, "when": {"vector": "v1", "above": -2.0, "layer": 0}}
CLOSED = {**ADD, "when": {"vector": "v1", "above": 2.0, "layer": 0}}
PER_TOKEN = {**ADD, "when": {"vector": "v1", "above": 0.0, "layer": 0, "scope": "token"}}
GREEDY = SamplingParams(max_tokens=12, temperature=0, ignore_eos=True, logprobs=2)

Make = Callable[..., TransformersEngine]


def need_packing() -> None:
    """Skips beside a vLLM that holds transformers back; nowhere else."""
    series = ".".join(transformers.__version__.split(".")[:2])
    if series not in KNOWN_SERIES and importlib.util.find_spec("vllm") is not None:
        pytest.skip(
            f"packed batches know transformers {', '.join(KNOWN_SERIES)}; this vLLM asks for an "
            f"older one, {transformers.__version__}"
        )


@pytest.fixture
def make(tiny_model: Callable[[str], torch.nn.Module]) -> Iterator[Make]:
    """Starts engines over a shared tiny model, and stops them."""
    made: list[TransformersEngine] = []

    def get(batching: str, *, model: str = "llama", **options: Any) -> TransformersEngine:
        if batching == "packed":
            need_packing()
        options = {"rows": 8, "slots": 4, "cache_tokens": 1024, "prefill_tokens": 64} | options
        engine = TransformersEngine(tiny_model(model), None, batching=batching, **options)
        made.append(engine)
        engine.start()
        return engine

    yield get
    for engine in made:
        engine.stop()


def plans(engine: TransformersEngine) -> PlanCache:
    return PlanCache(MemoryLibrary(**MADE), engine.info, engine.capabilities)


def request(
    engine: TransformersEngine,
    spec: dict[str, Any] | None,
    prompt: tuple[int, ...],
    sampling: SamplingParams = GREEDY,
    **more: Any,
) -> GenerationRequest:
    plan = None if spec is None else plans(engine).plan(parse_spec(spec))
    return GenerationRequest("r", prompt, sampling, plan, **more)


def prompt_of(draw: random.Random, longest: int = 40) -> tuple[int, ...]:
    return tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, longest)))


def workload(engine: TransformersEngine, seed: int, count: int = 16) -> list[GenerationRequest]:
    """Requests of all kinds: unsteered ones, random specs, and each sort of gate."""
    draw = random.Random(seed)
    made = []
    for number in range(count):
        gate = {3: GATED, 5: CLOSED, 7: PER_TOKEN}.get(number % 8)
        spec = gate or (random_spec(draw, layers=LAYERS, longest=3) if number % 4 else None)
        sampling = SamplingParams(
            max_tokens=draw.randint(1, 14), temperature=0, ignore_eos=True, logprobs=0
        )
        made.append(request(engine, spec, prompt_of(draw), sampling, measure=bool(number % 2)))
    return made


def assert_same(got: list[Completion], expected: list[Completion]) -> None:
    for number, (one, other) in enumerate(zip(got, expected, strict=True)):
        assert one.tokens == other.tokens, number
        assert one.finish == other.finish
        mine = [entry.logprob for entry in one.logprobs]
        assert mine == pytest.approx([entry.logprob for entry in other.logprobs], abs=1e-4)
        assert_same_receipt(one.receipt, other.receipt)


def assert_same_receipt(got: Receipt | None, expected: Receipt | None) -> None:
    if got is None or expected is None:
        assert got is expected
        return
    assert (got.fingerprint, got.tokens_steered, got.tokens_skipped, got.tokens_cached) == (
        expected.fingerprint,
        expected.tokens_steered,
        expected.tokens_skipped,
        expected.tokens_cached,
    )
    for point, other in zip(got.hook_points, expected.hook_points, strict=True):
        assert (point.point, point.tokens) == (other.point, other.tokens)
        assert near(point.relative_size, other.relative_size)
    for gate, twin in zip(got.gates, expected.gates, strict=True):
        assert (gate.name, gate.fired) == (twin.name, twin.fired)
        assert near(gate.value, twin.value)


def near(one: float | None, other: float | None) -> bool:
    if one is None or other is None:
        return one is other
    return one == pytest.approx(other, rel=1e-3, abs=1e-4)


@pytest.mark.parametrize("model", ARCHITECTURES)
def test_equals_the_rolling_batch(make: Make, model: str) -> None:
    rolling, packed = make("rolling", model=model), make("packed", model=model)
    expected = rolling.complete(workload(rolling, 1))
    assert_same(packed.complete(workload(packed, 1)), expected)
    assert packed.stats().slots_in_use == 0


def test_a_batch_equals_its_requests_one_at_a_time(make: Make) -> None:
    packed = make("packed")
    together = packed.complete(workload(packed, 2))
    alone = [packed.complete([one])[0] for one in workload(packed, 2)]
    assert_same(together, alone)


def test_chunked_prompts(make: Make) -> None:
    rolling, packed = make("rolling"), make("packed", prefill_tokens=16)
    expected = rolling.complete(workload(rolling, 3))
    assert_same(packed.complete(workload(packed, 3)), expected)


@pytest.mark.parametrize("seed", [4, 5])
def test_sequences_that_were_put_back(
    make: Make, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    again = 0
    recount = Ledger.recount

    def counted(ledger: Ledger, row: int) -> None:
        nonlocal again
        again += 1
        recount(ledger, row)

    monkeypatch.setattr(Ledger, "recount", counted)
    rolling, packed = make("rolling"), make("packed", cache_tokens=64, prefill_tokens=32)
    draw = random.Random(seed)
    shapes = [
        (spec, prompt_of(draw, 20), SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
        for spec in (ADD, None, PER_TOKEN, CLOSED, GATED, GATED, GATED, GATED)
    ]
    expected = rolling.complete([request(rolling, *shape, measure=True) for shape in shapes])
    got = packed.complete([request(packed, *shape, measure=True) for shape in shapes])
    assert again > 0, "the cache was large enough for all: nothing was tested"
    assert_same(got, expected)


@pytest.mark.parametrize("steered_first", [True, False])
@pytest.mark.parametrize("together", [True, False])
def test_no_state_reaches_another_request(make: Make, steered_first: bool, together: bool) -> None:
    rolling, packed = make("rolling"), make("packed")
    prompt = tuple(range(3, 51))  # three whole pages, which prefix sharing would share
    order = (ADD, None) if steered_first else (None, ADD)
    requests = [request(packed, spec, prompt) for spec in (*order, *order)]
    shares = [requests] if together else [[one] for one in requests]
    got = [one for share in shares for one in packed.complete(share)]
    for one, spec in zip(got, (*order, *order), strict=True):
        assert_same([one], rolling.complete([request(rolling, spec, prompt)]))


def test_sampling_with_a_seed_draws_the_same_tokens(make: Make) -> None:
    rolling, packed = make("rolling"), make("packed")
    draw = random.Random(8)
    settings = [
        SamplingParams(max_tokens=10, temperature=0.9, seed=1, ignore_eos=True, logprobs=5),
        SamplingParams(max_tokens=10, temperature=1.0, top_p=0.8, seed=2, ignore_eos=True),
        SamplingParams(max_tokens=10, temperature=1.5, top_k=7, seed=3, ignore_eos=True),
        SamplingParams(max_tokens=10, temperature=0, ignore_eos=True, logprobs=3),
    ]
    shapes = [(ADD if n % 2 else None, prompt_of(draw), one) for n, one in enumerate(settings)]
    expected = rolling.complete([request(rolling, *shape) for shape in shapes])
    got = packed.complete([request(packed, *shape) for shape in shapes])
    assert_same(got, expected)
    assert [t for t, _ in got[0].logprobs[0].top] == [t for t, _ in expected[0].logprobs[0].top]


def test_ends_where_a_rolling_batch_ends(make: Make) -> None:
    rolling, packed = make("rolling"), make("packed")
    prompt = (5, 6, 7)
    (free,) = packed.complete([request(packed, ADD, prompt)])
    third = free.tokens[2]
    stopping = {"stop": lambda token: token == third}
    expected = rolling.complete([request(rolling, ADD, prompt, **stopping)])
    got = packed.complete([request(packed, ADD, prompt, **stopping)])
    assert got[0].finish == "stop"
    assert_same(got, expected)


def test_a_sequence_ends_where_the_context_ends(make: Make) -> None:
    rolling, packed = make("rolling"), make("packed")
    endless = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True)
    prompt = tuple(range(3, 83))
    expected = rolling.complete([request(rolling, ADD, prompt, endless)])
    got = packed.complete([request(packed, ADD, prompt, endless)])
    assert_same(got, expected)
    assert len(prompt) + len(got[0].tokens) == packed.info.max_length


def test_a_sequence_never_outgrows_the_cache(make: Make) -> None:
    packed = make("packed", cache_tokens=64)
    endless = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True)
    got = packed.complete([request(packed, ADD, (5, 6, 7), endless) for _ in range(3)])
    assert {one.finish for one in got} == {"length"}
    assert {3 + len(one.tokens) for one in got} == {64}
    with pytest.raises(SteerError, match="64") as refused:
        packed.admit(request(packed, None, tuple(range(3, 80))))
    assert refused.value.code == "context_length_exceeded"


def test_one_row_at_a_time(make: Make) -> None:
    rolling, packed = make("rolling"), make("packed", rows=1, prefill_tokens=1)
    expected = rolling.complete(workload(rolling, 9, count=4))
    assert_same(packed.complete(workload(packed, 9, count=4)), expected)


def test_half_precision_is_proved(make: Make, tiny_model: Callable[[str], Any]) -> None:
    need_packing()
    model = copy.deepcopy(tiny_model("llama")).to(torch.bfloat16)
    options = {"rows": 4, "slots": 2, "cache_tokens": 512, "prefill_tokens": 64}
    with TransformersEngine(model, None, batching="packed", **options) as engine:
        (steered, plain) = engine.complete(
            [request(engine, spec, (5, 6, 7, 8)) for spec in (ADD, None)]
        )
    assert steered.tokens != plain.tokens


def test_requests_wait_for_slots(make: Make) -> None:
    packed = make("packed", slots=1)
    specs = [{"interventions": [{"kind": "add", "vector": f"v{n}"}]} for n in range(4)]
    got = complete_together(packed, [request(packed, spec, (5, 6, 7)) for spec in specs])
    alone = [packed.complete([request(packed, spec, (5, 6, 7))])[0] for spec in specs]
    assert_same(got, alone)
    assert packed.stats().slot_waits > 0
    assert packed.stats().slots_in_use == 0


async def test_cancelling_frees_the_slot_and_the_cache(make: Make) -> None:
    packed = make("packed", slots=1, cache_tokens=64)
    endless = SamplingParams(max_tokens=10_000, temperature=0, ignore_eos=True)
    for _ in range(5):
        stream = packed.generate(request(packed, ADD, tuple(range(3, 33)), endless))
        await anext(stream)
        await stream.aclose()
    other = {"interventions": [{"kind": "ablate", "vector": "v3"}]}
    (got,) = packed.complete([request(packed, other, (5, 6, 7), endless)])
    assert 3 + len(got.tokens) == 64, "all of the cache is free again"
    assert packed.stats().slots_in_use == 0


def test_a_failed_pass_fails_its_requests_and_no_others(make: Make) -> None:
    packed = make("packed")
    (before,) = packed.complete([request(packed, ADD, (5, 6, 7))])

    def fail(module: torch.nn.Module, args: Any) -> None:
        raise RuntimeError("out of memory")

    handle = packed._hooked.model.register_forward_pre_hook(fail)
    try:
        with pytest.raises(EngineError, match="out of memory"):
            packed.complete([request(packed, ADD, (5, 6, 7)), request(packed, None, (5, 6))])
    finally:
        handle.remove()
    assert packed.stats().slots_in_use == 0
    assert_same(packed.complete([request(packed, ADD, (5, 6, 7))]), [before])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_captures_run_between_passes(make: Make, attention: str) -> None:
    rolling, packed = make("rolling"), make("packed")
    model: Any = packed._hooked.model
    model.set_attn_implementation(attention)
    try:
        packed = make("packed")
        points = tuple(HookPoint(layer, "resid_post") for layer in range(LAYERS))
        plan = plans(packed).plan(parse_spec(ADD))
        prompts = [(5, 6, 7, 8), (9, 10)]
        asked = CaptureRequest(prompts, points, None, [plan, None], "last")
        expected = rolling.capture(asked)
        first = packed.complete([request(packed, ADD, (5, 6, 7))])
        got = packed.capture(asked)
        assert_same(packed.complete([request(packed, ADD, (5, 6, 7))]), first)
        for one, other in zip(got, expected, strict=True):
            for point in points:
                torch.testing.assert_close(one.states[point], other.states[point])
            torch.testing.assert_close(one.logits, other.logits)
        states = got[0].states[points[-1]]
        torch.testing.assert_close(packed.unembed(states), rolling.unembed(states))
        packed.stop()
        assert model.config._attn_implementation == attention
    finally:
        model.set_attn_implementation("sdpa")


def test_the_seeds_of_others_are_left_alone(make: Make) -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    make("packed")
    assert torch.equal(torch.rand(3), expected)


def test_a_model_that_was_refused_is_left_as_it_was(
    make: Make, tiny_model: Callable[[str], torch.nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = tiny_model("llama")
    model.set_attn_implementation("eager")
    monkeypatch.setattr(packed_model, "_check_plain", _refuse)
    try:
        with pytest.raises(Unsupported, match="never"):
            make("packed")
        assert model.config._attn_implementation == "eager"
    finally:
        model.set_attn_implementation("sdpa")


def _refuse(processor: object) -> None:
    raise Unsupported("never")


def test_auto_pads_on_a_cpu(make: Make) -> None:
    assert type(make("auto")._batch).__name__ == "RollingBatch"
    with pytest.raises(SteerError, match="'ragged'"):
        make("ragged")


def test_this_transformers_is_known() -> None:
    need_packing()
    check_transformers()


@pytest.mark.parametrize("version", ["5.18.2", "5.99.1"])
def test_an_unknown_transformers_is_refused_by_name(
    tiny_model: Callable[[str], torch.nn.Module], monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    """In every environment, so also where that transformers lacks what packed batches call."""
    monkeypatch.setattr(packed_model.transformers, "__version__", version)
    series = version.rpartition(".")[0]
    with pytest.raises(
        Unsupported, match=rf"transformers {version} \(the series {series}.*one of 5\.19, 5\.20"
    ):
        TransformersEngine(tiny_model("llama"), None, batching="packed")


def test_a_changed_signature_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    method = "continuous_api.ContinuousBatchProcessor.prepare_next_batch"
    monkeypatch.setitem(packed_model._SEAM, method, ("ahead",))
    with pytest.raises(Unsupported, match="prepare_next_batch"):
        check_transformers()


def test_a_method_that_is_gone_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(packed_model._SEAM, "cache.PagedAttentionCache.no_such_method", ())
    with pytest.raises(Unsupported, match="no_such_method"):
        check_transformers()


@pytest.mark.parametrize(
    ("option", "value", "name"),
    [
        ("allow_block_sharing", True, "prefix sharing"),
        ("varlen_compile_config", CompileConfig(), "padded batches"),
    ],
)
def test_modes_that_are_not_exact_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch, option: str, value: object, name: str
) -> None:
    config = packed_model.ContinuousBatchingConfig
    monkeypatch.setattr(
        packed_model,
        "ContinuousBatchingConfig",
        lambda **given: config(**{**given, option: value}),
    )
    with pytest.raises(Unsupported, match=name):
        make("packed")


def test_the_proof_finds_sequences_that_see_each_other(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def everything(attention_mask: torch.Tensor, **_: Any) -> None:
        attention_mask.zero_()

    monkeypatch.setattr(input_outputs, "build_attention_mask", everything)
    with pytest.raises(Unsupported, match="other logits in packed batches"):
        make("packed")


def test_tokens_that_were_never_computed_here_are_refused(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    packed = make("packed")
    planned = packed_model.PackedModel.next

    def later(model: packed_model.PackedModel) -> list[packed_model.Chunk]:
        return [packed_model.Chunk(c.key, c.start + 16, c.length, c.final) for c in planned(model)]

    monkeypatch.setattr(packed_model.PackedModel, "next", later)
    with pytest.raises(EngineError, match="position 16"):
        packed.complete([request(packed, ADD, (5, 6, 7))])
    assert packed.stats().slots_in_use == 0


@pytest.mark.slow
def test_the_demo_model() -> None:
    need_packing()
    folder = Path(__file__).parents[2] / "vectors" / "demo" / "model"
    forms = {}
    for batching in ("rolling", "packed"):
        with TransformersEngine.load(folder, name="steer-demo", batching=batching) as engine:
            ids = [
                tuple(engine.tokenizer.encode(text))
                for text in ("How is the weather today?", "Tell me about your trip", "Hello")
            ]
            specs = [None, {"interventions": [{"kind": "ablate", "vector": "v"}]}]
            vector = artefacts(engine.info.d_model, engine.info.n_layers)["vectors"]["v0"]
            library = MemoryLibrary({"v": vector})
            cache = PlanCache(library, engine.info, engine.capabilities)
            requests = [
                GenerationRequest("r", prompt, GREEDY, spec and cache.plan(parse_spec(spec)))
                for prompt in ids
                for spec in specs
            ]
            forms[batching] = engine.complete(requests)
    assert_same(forms["packed"], forms["rolling"])
