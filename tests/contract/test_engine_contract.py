"""What every engine owes a request, whatever model it runs and whoever runs beside it."""

from __future__ import annotations

import asyncio
import random
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from artefacts import CLAMPS, random_detector, random_lens, random_map, random_sae, random_vector
from float64_reference import selected
from liveness import LIVENESS_SECONDS
from tiny_models import ARCHITECTURES, LAYERS, VOCABULARY, WIDTH
from together import complete_together, submit_together

from steer.artefacts.arming import ArmedDetector, ReadTokens
from steer.artefacts.detection import Detection
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Completion, GenerationRequest, SamplingParams
from steer.engines.token_rows import token_reader
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import EngineError, SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.readouts.watching import ArmedPlan, WatchPlan
from steer.spec import parse_spec

TinyModel = Callable[[str], torch.nn.Module]

VECTORS = {f"v{n}": random_vector(n, *range(LAYERS), width=WIDTH) for n in range(4)}
SAES = {
    name: random_sae(name, seed=40 + n, width=WIDTH, layer=1)
    for n, name in enumerate(("jumprelu", "topk"))
} | {
    "centred": random_sae("jumprelu-centred", seed=42, width=WIDTH, layer=0),
    "ranked": random_sae("topk-centred", seed=43, width=WIDTH, layer=2),
    "rescaled": random_sae("jumprelu-rescaled", seed=44, width=WIDTH, layer=1),
}
MAPS = {"map": random_map(50, 0, 1, width=WIDTH)}
LENSES = {"tuned": random_lens(51, LAYERS, WIDTH)}
DETECTORS = {
    "d0": random_detector(60, 0, width=WIDTH, bias=0.2),
    "d1": random_detector(61, 1, width=WIDTH, bias=-0.1, threshold=0.1),
    "d2": random_detector(60, 0, width=WIDTH, detection=Detection(pooling="max", last=3)),
    "d3": random_detector(61, 1, width=WIDTH, detection=Detection(pooling="mean", last=4)),
}


def add(vector: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": vector, "layers": [0, 1], "strength": 1.5, **fields}


def ablate(vector: str, **fields: Any) -> dict[str, Any]:
    return {"kind": "ablate", "vector": vector, "layers": [1, 2], **fields}


def one(item: dict[str, Any], **rest: Any) -> dict[str, Any]:
    return {"interventions": [item], **rest}


SPECS: dict[str, dict[str, Any] | None] = {
    "unsteered": None,
    "everything": one(add("v0")),
    "prompt only": one(add("v1"), where={"phases": ["prompt"]}),
    "generation only": {"interventions": [add("v2"), ablate("v0")]}
    | {"where": {"phases": ["generation"]}},
    "a window": one(
        add("v3"), where={"positions": [[-2, None]], "except": {"positions": [[4, 6]]}}
    ),
    "token triggers": one(add("v0", strength=-2), where={"tokens": list(range(0, VOCABULARY, 2))}),
    "a prompt gate": one(
        ablate("v2"),
        when={"vector": "v1", "above": 0.0, "layer": 0},
        where={"positions": [[2, None]]},
    ),
    "a prompt gate on what is generated": one(
        add("v2", layers=[1]),
        when={"vector": "v3", "above": 0.0, "layer": 0},
        where={"phases": ["generation"]},
    ),
    "a token gate": one(
        add("v1", layers=[2]), when={"vector": "v0", "below": 0.1, "layer": 1, "scope": "token"}
    ),
    "a detector's gate": one(add("v0", layers=[1, 2]), when={"detector": "d0", "threshold": -0.1}),
    "a detector's gate on each token": one(
        add("v3", layers=[2]), when={"detector": "d1", "scope": "token"}
    ),
    "a detector's gate onward": one(
        add("v3", layers=[2], where={"positions": [[1, None]]}),
        when={"detector": "d1", "threshold": 1.0, "scope": "onward"},
    ),
    "a pooled gate": one(add("v1", layers=[1, 2]), when={"detector": "d2"}),
    "a pooled gate on each token": one(
        add("v3", layers=[2]), when={"detector": "d3", "scope": "token"}
    ),
    "a pooled gate onward": one(
        add("v2", layers=[2], where={"phases": ["generation"]}),
        when={"detector": "d3", "scope": "onward"},
    ),
    "an onward gate on what is generated": one(
        add("v1", layers=[1, 2], where={"phases": ["generation"]}),
        when={"vector": "v2", "above": 0.05, "layer": 1, "scope": "onward"},
    ),
    "a clamp": one({"kind": "clamp", "sae": "jumprelu", "features": [1, 5, 9], "value": 4.0}),
    "a clamp that competes": {
        "interventions": [
            {"kind": "clamp", "sae": "topk", "features": [2, 7], "value": 3.0, "mode": "at_least"},
            add("v3", strength={"norm": 0.4}),
        ]
    },
    "clamps of every measure": {
        "interventions": [
            {**CLAMPS[name], "sae": sae}
            for name, sae in (
                ("clamp set where active standard", "jumprelu"),
                ("clamp set a share standard", "jumprelu"),
                ("clamp add a share in balance jumprelu-centred", "centred"),
                ("clamp at_least topk-centred", "ranked"),
                ("clamp drop jumprelu-rescaled", "rescaled"),
            )
        ]
    },
    "read a cosine": one(
        {"kind": "read_write", "read": "v1", "write": "v2", "measure": "cosine"}
        | {"strength": {"norm": 4.0}, "layers": [0, 1]}
    ),
    "channels": one({"kind": "affine", "map": "map"}),
    "an angle": one(
        {"kind": "rotate", "vector": "v0", "toward": "v3", "degrees": 120, "mode": "to"}
        | {"only": "positive", "layers": [0, 1, 2]}
    ),
    "norm preserved": {
        "interventions": [add("v0", strength=4), ablate("v1", layers=[0, 1])],
        "norm": "preserve",
    },
    "tokens of lenses": {
        "interventions": [
            {"kind": "exchange", "vector": {"token": 9}, "toward": {"token": 11}, "layers": [1]},
            add({"token": 5, "lens": "tuned"}, strength={"norm": 0.4}, layers=[0, 2]),
        ]
    },
}
GATED = [name for name, spec in SPECS.items() if spec and "when" in spec]


def make_engine(model: torch.nn.Module, **options: Any) -> TransformersEngine:
    return TransformersEngine(model, None, **{"rows": 5, "slots": 3, "chunk": 64, **options})


@pytest.fixture(params=ARCHITECTURES)
def engine(request: pytest.FixtureRequest, tiny_model: TinyModel) -> Iterator[TransformersEngine]:
    with make_engine(tiny_model(request.param)) as running:
        yield running


@pytest.fixture
def llama(tiny_model: TinyModel) -> Iterator[TransformersEngine]:
    with make_engine(tiny_model("llama")) as running:
        yield running


def plans_of(engine: TransformersEngine) -> PlanCache:
    library = MemoryLibrary(VECTORS, SAES, maps=MAPS, lenses=LENSES, detectors=DETECTORS)
    read_token = token_reader(engine, None)
    return PlanCache(library, engine.info, engine.capabilities, read_token=read_token)


def plan(engine: TransformersEngine, spec: dict[str, Any] | None) -> SteeringPlan | None:
    return None if spec is None else plans_of(engine).plan(parse_spec(spec))


def requests_for(
    engine: TransformersEngine, count: int = 36, seed: int = 0
) -> list[GenerationRequest]:
    """Prompts of 1 to 40 tokens over all specs; every fifth samples, with a seed of its own."""
    draw = random.Random(seed)
    compiled = {name: plan(engine, spec) for name, spec in SPECS.items()}
    found = []
    for n in range(count):
        name = list(SPECS)[n % len(SPECS)]
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 40)))
        sampling = SamplingParams(
            max_tokens=draw.randint(1, 14),
            temperature=0.9 if n % 5 == 4 else 0,
            top_p=0.9,
            top_k=30,
            seed=n,
            logprobs=2,
            ignore_eos=True,
        )
        found.append(GenerationRequest(f"{n} {name}", prompt, sampling, compiled[name]))
    draw.shuffle(found)
    return found


def assert_all_free(engine: TransformersEngine) -> None:
    """Every slot and every ledger row can be taken again; nothing was given back twice."""
    engine._scheduler.run(lambda: None)  # the pass that gave the last token is over
    stats = engine.stats()
    assert (stats.slots_in_use, stats.requests_running, stats.requests_waiting) == (0, 0, 0)
    free = engine._batch._free_rows
    assert sorted(free) == list(range(len(free)))
    assert engine._batch.sequences == []
    assert engine._scheduler._tickets == {}


def assert_same(mine: Completion, other: Completion) -> None:
    assert mine.tokens == other.tokens
    for a, b in zip(mine.logprobs, other.logprobs, strict=True):
        assert abs(a.logprob - b.logprob) <= 1e-4
    assert mine.receipt == other.receipt or _close_gates(mine, other)


def _close_gates(mine: Completion, other: Completion) -> bool:
    a, b = mine.receipt, other.receipt
    assert a is not None
    assert b is not None
    for x, y in zip(a.gates, b.gates, strict=True):
        assert (x.fired, x.position) == (y.fired, y.position)
        assert x.value == pytest.approx(y.value, abs=1e-4)
    return a.hook_points == b.hook_points and a.tokens_steered == b.tokens_steered


def test_a_mixed_batch_equals_one_at_a_time(engine: TransformersEngine) -> None:
    requests = requests_for(engine)
    together = complete_together(engine, requests)
    assert engine.stats().slot_waits > 0, "no request had to wait: the test has too many slots"
    for request, mine in zip(requests, together, strict=True):
        assert len(mine.tokens) == request.sampling.max_tokens
        assert_same(mine, engine.complete([request])[0])
    assert_all_free(engine)


def test_every_spec_changes_what_is_generated(llama: TransformersEngine) -> None:
    """Guards the test above: equal results would prove little if steering did nothing."""
    prompts = [tuple(range(n, n + 12)) for n in range(3, 60, 7)]
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    def run(spec: dict[str, Any] | None) -> list[tuple[int, ...]]:
        compiled = plan(llama, spec)
        requests = [GenerationRequest("x", p, sampling, compiled) for p in prompts]
        return [done.tokens for done in llama.complete(requests)]

    plain = run(None)
    for name, spec in SPECS.items():
        if spec is not None:
            assert run(spec) != plain, name


def test_receipts_equal_an_independent_count(engine: TransformersEngine) -> None:
    requests = [r for r in requests_for(engine, 30, seed=1) if r.plan is not None]
    for request, done in zip(requests, engine.complete(requests), strict=True):
        receipt, spec = done.receipt, request.plan.spec if request.plan else None
        assert receipt is not None
        assert spec is not None
        fed = [*request.prompt, *done.tokens[:-1]]
        assert receipt.tokens_steered + receipt.tokens_skipped == len(fed)
        if spec.when is not None:
            continue
        touched = {
            n for n, token in enumerate(fed) if selected(spec.where, n, len(request.prompt), token)
        }
        assert receipt.tokens_steered == len(touched)
        assert {entry.tokens for entry in receipt.hook_points} == {len(touched)}


def test_a_prompt_gate_holds_its_decision(engine: TransformersEngine) -> None:
    compiled = plan(engine, SPECS["a prompt gate on what is generated"])
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    draw = random.Random(3)
    prompts = [tuple(draw.randrange(3, 99) for _ in range(draw.randint(2, 9))) for _ in range(20)]
    states = engine.capture(CaptureRequest(prompts, (HookPoint(0),), (-1,)))
    done = engine.complete([GenerationRequest("g", p, sampling, compiled) for p in prompts])
    outcomes = set()
    direction = VECTORS["v3"][0]
    for state, completion in zip(states, done, strict=True):
        cosine = float(torch.cosine_similarity(state.states[HookPoint(0)][0], direction, dim=0))
        assert completion.receipt is not None
        (gate,) = completion.receipt.gates
        assert gate.value == pytest.approx(cosine, abs=1e-4)
        assert gate.fired == completion.receipt.tokens_steered == (5 if cosine > 0 else 0)
        outcomes.add(cosine > 0)
    assert outcomes == {True, False}


def test_a_detectors_gate_is_open_where_the_detector_fires(engine: TransformersEngine) -> None:
    """For each token by itself, on the states of its layer; what is told is its score."""
    held, each = (
        plan(engine, SPECS[f"a detector's gate{name}"]) for name in ("", " on each token")
    )
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    draw = random.Random(5)
    prompts = [tuple(draw.randrange(3, 99) for _ in range(draw.randint(2, 9))) for _ in range(20)]
    outcomes = set()
    for compiled, detector, threshold in (
        (held, DETECTORS["d0"], -0.1),
        (each, DETECTORS["d1"], 0.1),
    ):
        done = engine.complete([GenerationRequest("g", p, sampling, compiled) for p in prompts])
        fed = [(*prompt, *one.tokens[:-1]) for prompt, one in zip(prompts, done, strict=True)]
        plans = [compiled] * len(fed)
        read = engine.capture(CaptureRequest(fed, (detector.point,), plans=plans))
        for prompt, states, completion in zip(prompts, read, done, strict=True):
            assert completion.receipt is not None
            (gate,) = completion.receipt.gates
            scores = detector.scores(states.states[detector.point]).tolist()
            if compiled is held:
                score = scores[len(prompt) - 1]
                assert gate.value == pytest.approx(score, abs=1e-4)
                assert (
                    gate.fired
                    == completion.receipt.tokens_steered
                    == (6 if score > threshold else 0)
                )
                outcomes.add(score > threshold)
            else:
                fired = sum(score > threshold for score in scores)
                assert (gate.value, gate.fired) == (None, fired)
                assert completion.receipt.tokens_steered == fired
                outcomes.add(0 < fired < len(scores))
    assert outcomes == {True, False}


def test_an_onward_gate_opens_where_the_detector_first_fires(engine: TransformersEngine) -> None:
    """In prompts, in answers or never; never at a token that its intervention does not select."""
    detector = DETECTORS["d1"]
    sampling = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
    draw = random.Random(6)
    prompts = [tuple(draw.randrange(3, 99) for _ in range(draw.randint(2, 9))) for _ in range(30)]
    plain = engine.capture(CaptureRequest(prompts, (detector.point,)))
    greatest = [float(detector.scores(one.states[detector.point])[1:].max()) for one in plain]
    threshold = sum(sorted(greatest)[19:21]) / 2
    spec = SPECS["a detector's gate onward"]
    assert spec is not None
    compiled = plan(engine, {**spec, "when": {**spec["when"], "threshold": threshold}})
    done = engine.complete([GenerationRequest("g", p, sampling, compiled) for p in prompts])
    fed = [(*prompt, *one.tokens[:-1]) for prompt, one in zip(prompts, done, strict=True)]
    plans = [compiled] * len(fed)
    read = engine.capture(CaptureRequest(fed, (detector.point,), plans=plans))
    met = set()
    for prompt, states, completion in zip(prompts, read, done, strict=True):
        assert completion.receipt is not None
        (gate,) = completion.receipt.gates
        scores = detector.scores(states.states[detector.point]).tolist()
        onset = next((n for n, score in enumerate(scores) if n and score > threshold), None)
        assert gate.position == onset
        assert gate.fired == (0 if onset is None else len(scores) - onset)
        assert completion.receipt.tokens_steered == gate.fired
        if onset is None:
            assert gate.value is None
        else:
            assert gate.value == pytest.approx(scores[onset], abs=1e-4)
        met.add("never" if onset is None else "prompt" if onset < len(prompt) else "answer")
    assert met == {"never", "prompt", "answer"}


@pytest.mark.parametrize(
    ("scope", "name", "tokens"),
    [
        ("prompt", "d2", "prompt"),
        ("prompt", "d3", "prompt"),
        ("token", "d2", "all"),
        ("token", "d3", "generated"),
        ("onward", "d2", "generated"),
        ("onward", "d3", "all"),
    ],
)
def test_a_pooled_gate_fires_where_the_armed_detector_does(
    engine: TransformersEngine, scope: str, name: str, tokens: ReadTokens
) -> None:
    """Both in one request; the gate reads what the detector watches, which is edited nowhere: not
    the first token of all."""
    detector = DETECTORS[name]
    draw = random.Random(7)
    prompts = [tuple(draw.randrange(3, 99) for _ in range(draw.randint(2, 9))) for _ in range(24)]
    sampling = SamplingParams(max_tokens=8, temperature=0, ignore_eos=True)

    def answers(steered: SteeringPlan | None, threshold: float) -> tuple[WatchPlan, Any]:
        armed = ArmedDetector(name=name, tokens=tokens, threshold=threshold)
        watching = WatchPlan(armed=(ArmedPlan(armed, detector),))
        reads = watching.readouts
        asked = [GenerationRequest("g", p, sampling, steered, readouts=reads) for p in prompts]
        return watching, engine.complete(asked)

    def pools(completion: Completion) -> dict[int, float]:
        window, first = detector.window(), 1 if tokens == "all" else 0
        rows = [row for row in completion.readouts if row.position >= first]
        return {row.position: window.push(row.numbers[0]) for row in rows}

    plain = [list(pools(one).values()) for one in answers(None, 0.0)[1]]
    told = sorted(values[-1] if scope == "prompt" else max(values) for values in plain)
    threshold = sum(told[11:13]) / 2
    when = {"detector": name, "scope": scope, "threshold": threshold}
    where = {
        "generated": {"where": {"phases": ["generation"]}},
        "all": {"where": {"positions": [[1, None]]}},
        "prompt": {},
    }[tokens]
    watching, done = answers(plan(engine, one(add("v3", layers=[2]), when=when) | where), threshold)
    met = set()
    for prompt, completion in zip(prompts, done, strict=True):
        assert completion.receipt is not None
        (gate,) = completion.receipt.gates
        pooled = pools(completion)
        watch = watching.watch(len(prompt))
        assert watch is not None
        watch.see((row.position, row.numbers) for row in completion.readouts)
        fired_at = watch.detections[0].fired_at
        if scope == "prompt":
            value = pooled[len(prompt) - 1]
            assert gate.value == pytest.approx(value, abs=1e-5)
            assert gate.position == (len(prompt) - 1 if value > threshold else None)
            assert gate.fired == (8 if value > threshold else 0)
        elif scope == "onward":
            assert gate.position == fired_at
            if fired_at is not None:
                assert gate.value == pytest.approx(pooled[fired_at], abs=1e-5)
        else:
            assert gate.fired == sum(value > threshold for value in pooled.values())
        met.add(gate.fired > 0)
    assert met == {True, False}


def test_chunked_prompts_equal_whole_ones(
    engine: TransformersEngine, tiny_model: TinyModel
) -> None:
    requests = requests_for(engine, 24, seed=2)
    whole = engine.complete(requests)
    with make_engine(engine._hooked.model, chunk=3) as chunked:
        for mine, other in zip(chunked.complete(requests), whole, strict=True):
            assert_same(mine, other)


def test_unsteered_rows_are_bit_identical_to_the_bare_model(engine: TransformersEngine) -> None:
    """At the same batch shape: next to steered rows, next to none, and without Steer at all."""
    ids = torch.randint(3, VOCABULARY, (6, 10), generator=torch.Generator().manual_seed(4))
    prompts = [tuple(row) for row in ids.tolist()]
    with make_engine(engine._hooked.model, rows=6, slots=6) as wide:
        plans = [None, *(plan(wide, SPECS[name]) for name in ("everything", "a clamp")), None]
        plans += [plan(wide, SPECS["a token gate"]), None]
        mixed = wide.capture(CaptureRequest(prompts, plans=plans, logits="all"))
        alone = wide.capture(CaptureRequest(prompts, logits="all"))
        model = wide._hooked.model
    with torch.inference_mode():
        bare = model(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            position_ids=torch.arange(10).expand(6, 10),
            use_cache=True,
        ).logits.float()
    for row, chosen in enumerate(plans):
        logits = mixed[row].logits
        assert logits is not None
        if chosen is None:
            assert torch.equal(logits, bare[row])
        else:
            assert not torch.equal(logits, bare[row])
        unsteered = alone[row].logits
        assert unsteered is not None
        assert torch.equal(unsteered, bare[row])


@pytest.mark.parametrize("name", [name for name in SPECS if SPECS[name]])
def test_nothing_leaks_in_either_order(llama: TransformersEngine, name: str) -> None:
    """Steered and plain requests with one prompt, in turns, over several rounds."""
    prompt = tuple(range(5, 25))
    sampling = SamplingParams(max_tokens=8, temperature=0, logprobs=0, ignore_eos=True)
    plain = GenerationRequest("plain", prompt, sampling)
    steered = GenerationRequest("steered", prompt, sampling, plan(llama, SPECS[name]))
    first = llama.complete([plain, steered])
    history = prompt
    for order in ([plain, steered], [steered, plain], [steered], [plain]):
        for request in order:
            (done,) = llama.complete([request])
            assert_same(done, first[0] if request is plain else first[1])
    for turn in range(3):
        # The next turn of a chat: the text so far, and a new question.
        history = (*history, *first[1].tokens, 60 + turn)
        again = GenerationRequest("turn", history, sampling)
        (before,) = llama.complete([again])
        llama.complete([GenerationRequest("turn", history, sampling, steered.plan)])
        assert_same(llama.complete([again])[0], before)


def test_seeds_decide_what_is_sampled(llama: TransformersEngine) -> None:
    def sampled(seed: int) -> tuple[int, ...]:
        sampling = SamplingParams(max_tokens=12, temperature=1.0, seed=seed, ignore_eos=True)
        request = GenerationRequest("s", (5, 6, 7), sampling)
        neighbours = requests_for(llama, 6, seed=seed)
        return llama.complete([*neighbours[:3], request, *neighbours[3:]])[3].tokens

    assert sampled(1) == sampled(1)
    assert len({sampled(seed) for seed in range(4)}) == 4


async def test_cancelled_requests_free_what_they_held(llama: TransformersEngine) -> None:
    requests = requests_for(llama, 24, seed=5)
    alone = [llama.complete([request])[0] for request in requests]

    async def follow(request: GenerationRequest, stop_after: int | None) -> list[int]:
        tokens: list[int] = []
        events = llama.generate(request)
        async for event in events:
            tokens.append(event.token)
            if len(tokens) == stop_after:
                break
        await events.aclose()  # type: ignore[attr-defined]
        return tokens

    cuts = [1 + n % 3 if n % 2 else None for n in range(len(requests))]
    found = await asyncio.gather(*map(follow, requests, cuts))
    for tokens, whole, cut in zip(found, alone, cuts, strict=True):
        assert tuple(tokens) == whole.tokens[: cut or None]
    await asyncio.to_thread(llama.complete, requests[:2])
    assert_all_free(llama)


async def test_a_request_cancelled_while_it_waits_never_runs(
    llama: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Four plans on three slots. The engine stands still until all have come, and again, once the
    last of them waits for a slot, until they have left."""
    names = ("everything", "a clamp", "prompt only", "a window")
    all_come, waits, left = threading.Event(), threading.Event(), threading.Event()
    scheduler, submit, begin = llama._scheduler, llama._scheduler.submit, llama._scheduler._running
    submitted: list[str] = []
    begun: list[str] = []

    def counted(request: GenerationRequest, listener: Any) -> Any:
        ticket = submit(request, listener)
        submitted.append(request.id)
        if len(submitted) == len(names):
            all_come.set()
        return ticket

    def noted(ticket: Any) -> Any:
        begun.append(ticket.request.id)
        return begin(ticket)

    def hold(module: torch.nn.Module, args: Any) -> None:
        all_come.wait(LIVENESS_SECONDS)
        if scheduler.figures.slot_waits:
            waits.set()
            left.wait(LIVENESS_SECONDS)

    monkeypatch.setattr(scheduler, "submit", counted)
    monkeypatch.setattr(scheduler, "_running", noted)
    handle = llama._hooked.model.register_forward_pre_hook(hold)
    long = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
    running = [
        asyncio.create_task(
            _drain(llama, GenerationRequest(n, (5, 6), long, plan(llama, SPECS[n])))
        )
        for n in names
    ]
    try:
        assert await asyncio.to_thread(waits.wait, LIVENESS_SECONDS)
        for task in running[1:]:
            task.cancel()
        cancelled = await asyncio.gather(*running[1:], return_exceptions=True)
    finally:
        left.set()
    assert await running[0] == 60
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in cancelled)
    await asyncio.to_thread(llama.complete, [GenerationRequest("after", (5,), long)])
    handle.remove()
    assert begun == [*names[:3], "after"]
    assert_all_free(llama)


async def _drain(engine: TransformersEngine, request: GenerationRequest) -> int:
    return len([event async for event in engine.generate(request)])


@pytest.mark.parametrize("fail_at", [0, 1, 3, 7])
def test_a_failing_pass_fails_its_requests_and_no_others(
    llama: TransformersEngine, fail_at: int
) -> None:
    requests = requests_for(llama, 10, seed=6)
    wanted = llama.complete(requests)
    passes = 0

    def explode(module: torch.nn.Module, args: Any) -> None:
        nonlocal passes
        passes += 1
        # Twice: prompts whose pass failed are tried again, each in a pass of its own.
        if passes in (fail_at + 1, fail_at + 2):
            raise RuntimeError("the accelerator fell off")

    handle = llama._hooked.model.register_forward_pre_hook(explode)
    outcomes = asyncio.run(_outcomes(llama, requests))
    handle.remove()
    failed = [o for o in outcomes if isinstance(o, EngineError)]
    assert failed
    assert all("the accelerator fell off" in error.message for error in failed)
    for outcome, completion in zip(outcomes, wanted, strict=True):
        if not isinstance(outcome, EngineError):
            assert outcome == completion.tokens
    assert_all_free(llama)
    for mine, other in zip(llama.complete(requests), wanted, strict=True):
        assert_same(mine, other)


async def _outcomes(
    engine: TransformersEngine, requests: list[GenerationRequest]
) -> list[tuple[int, ...] | EngineError]:
    async def follow(request: GenerationRequest) -> tuple[int, ...] | EngineError:
        try:
            return tuple([event.token async for event in engine.generate(request)])
        except EngineError as error:
            return error

    return await asyncio.gather(*map(follow, requests))


@pytest.mark.parametrize("length", [3, 60], ids=["in one pass", "in passes apart"])
def test_a_prompt_whose_pass_fails_fails_alone(llama: TransformersEngine, length: int) -> None:
    """Its neighbours are those computed with it, before it, and those that run already."""
    sampling = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True)
    steered = plan(llama, SPECS["everything"])
    others = [
        GenerationRequest("a", (5, 6), sampling, steered),
        GenerationRequest("b", (7,), sampling),
    ]
    wanted = llama.complete(others)
    bad = GenerationRequest("c", tuple(range(30, 30 + length)), sampling, steered)

    def explode(module: torch.nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if 30 in kwargs["input_ids"]:
            raise RuntimeError("no such token")

    handle = llama._hooked.model.register_forward_pre_hook(explode, with_kwargs=True)
    first, last, second = submit_together(llama, (others[0], bad, others[1]))
    with pytest.raises(EngineError, match="no such token"):
        last.result()
    for listener, completion in zip((first, second), wanted, strict=True):
        assert_same(listener.result(), completion)
    handle.remove()
    assert_all_free(llama)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"prompt": ()}, "empty_prompt"),
        ({"prompt": tuple([5] * 128)}, "context_length_exceeded"),
        ({"prompt": (5, VOCABULARY)}, "unknown_token"),
        ({"prompt": (5, -1)}, "unknown_token"),
        ({"max_tokens": 0}, "invalid_sampling"),
        ({"temperature": -1.0}, "invalid_sampling"),
        ({"temperature": float("nan")}, "invalid_sampling"),
        ({"top_p": 1.5}, "invalid_sampling"),
        ({"top_k": 0}, "invalid_sampling"),
        ({"seed": 1 << 70}, "invalid_sampling"),
        ({"logprobs": VOCABULARY + 1}, "invalid_sampling"),
    ],
)
def test_what_cannot_run_is_refused_before_it_meets_others(
    llama: TransformersEngine, changes: dict[str, Any], code: str
) -> None:
    prompt = changes.get("prompt", (5, 6))
    fields = {key: value for key, value in changes.items() if key != "prompt"}
    request = GenerationRequest("bad", prompt, SamplingParams(**fields))
    with pytest.raises(SteerError) as caught:
        llama.complete([request])
    assert caught.value.code == code
    assert_all_free(llama)


def test_the_context_ends_a_request(llama: TransformersEngine) -> None:
    sampling = SamplingParams(max_tokens=50, temperature=0, ignore_eos=True)
    (done,) = llama.complete([GenerationRequest("x", tuple([7] * 120), sampling)])
    assert (len(done.tokens), done.finish) == (8, "length")


def test_stop_ends_a_request_with_its_receipt(llama: TransformersEngine) -> None:
    sampling = SamplingParams(max_tokens=20, temperature=0, ignore_eos=True)
    compiled = plan(llama, SPECS["everything"])
    (whole,) = llama.complete([GenerationRequest("x", (5, 6), sampling, compiled)])
    seen: list[int] = []

    def stop(token: int) -> bool:
        seen.append(token)
        return len(seen) == 4

    (done,) = llama.complete([GenerationRequest("x", (5, 6), sampling, compiled, stop=stop)])
    assert tuple(seen) == whole.tokens[:4]
    assert (done.tokens, done.finish) == (whole.tokens[:3], "stop")
    assert done.receipt is not None
    assert done.receipt.tokens_steered == 2 + 4 - 1


def test_an_engine_may_be_stopped_and_used_again(tiny_model: TinyModel) -> None:
    engine = make_engine(tiny_model("llama"))
    request = requests_for(engine, 3)[1]
    (before,) = engine.complete([request])
    engine.stop()
    engine.stop()
    assert all(
        not m._forward_hooks and not m._forward_pre_hooks for m in engine._hooked.model.modules()
    )
    assert_same(engine.complete([request])[0], before)
    engine.stop()


def test_measured_sizes_equal_their_definition(engine: TransformersEngine) -> None:
    """Mean ‖Δx‖/‖x‖ over the steered tokens, for a constant added to the first block's output."""
    spec = one({"kind": "add", "vector": "v0", "layers": [0], "strength": 1.0})
    prompt = tuple(range(10, 19))
    sampling = SamplingParams(max_tokens=1, temperature=0)
    request = GenerationRequest("m", prompt, sampling, plan(engine, spec), measure=True)
    (done,) = engine.complete([request])
    (plain,) = engine.capture(CaptureRequest([prompt], (HookPoint(0),)))
    sizes = VECTORS["v0"][0].norm() / plain.states[HookPoint(0)].norm(dim=-1)
    assert done.receipt is not None
    (entry,) = done.receipt.hook_points
    assert entry.relative_size == pytest.approx(float(sizes.mean()), rel=1e-4)


def test_a_prompts_log_probabilities_are_those_of_its_logits(
    engine: TransformersEngine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of unlike length over several chunks, each with a steering of its own."""
    monkeypatch.setattr("steer.engines.transformers.prompts.MOST_LOGITS", 15)
    draw = random.Random(8)
    lengths = (1, 2, 5, 17, 40)
    prompts = [tuple(draw.randrange(3, VOCABULARY) for _ in range(length)) for length in lengths]
    plans = [
        plan(engine, SPECS[name])
        for name in (GATED[0], "unsteered", "unsteered", "a clamp", "a window")
    ]
    found = engine.capture(CaptureRequest(prompts, plans=plans, logprobs=3))
    logits = engine.capture(CaptureRequest(prompts, plans=plans, logits="all"))
    for prompt, scored, whole in zip(prompts, found, logits, strict=True):
        assert whole.logits is not None
        assert len(scored.logprobs) == len(prompt) - 1
        table = whole.logits.double().log_softmax(-1)
        for place, (token, one) in enumerate(zip(prompt[1:], scored.logprobs, strict=True)):
            assert one.logprob == pytest.approx(float(table[place, token]), abs=1e-4)
            values = table[place].topk(3).values.tolist()
            assert [value for _, value in one.top] == pytest.approx(values, abs=1e-4)
