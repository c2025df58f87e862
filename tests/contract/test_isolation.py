"""Whatever a request holds, it ends alone: the batch goes on, and neighbours keep their bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hostile_requests import (
    ALTERNATING,
    KNOWN,
    LIBRARY,
    Hostile,
    admitted,
    inline,
    neighbours_of,
    one,
    requests,
)
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from tiny_models import build, tiny_tokenizer

from steer.engines.base import CaptureRequest, Completion, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import EngineError, NotFinite, SteerError, Unsupported
from steer.inspection.logit_lens import LogitLensRequest, logit_lens
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.spec import parse_spec

AT_ONCE = 16
"""Hostile requests in one batch of the fuzz."""


def make_engine(dtype: torch.dtype, batching: str, architecture: str) -> TransformersEngine:
    return TransformersEngine(
        build(architecture).to(dtype),
        tiny_tokenizer(),
        rows=AT_ONCE + 4,
        slots=AT_ONCE + 4,
        batching=batching,
    )


FORMS = {
    "float32": (torch.float32, "rolling", "llama"),
    "float16": (torch.float16, "rolling", "llama"),
    "layer norms": (torch.float32, "rolling", "gpt2"),
    "experts": (torch.float32, "rolling", "mixtral"),
    "packed": (torch.float32, "packed", "llama"),
}


@pytest.fixture(scope="module", params=FORMS)
def engine(request: pytest.FixtureRequest) -> Iterator[TransformersEngine]:
    with make_engine(*FORMS[request.param]) as running:
        yield running


@pytest.fixture(scope="module")
def llama() -> Iterator[TransformersEngine]:
    with make_engine(*FORMS["float32"]) as running:
        yield running


def add(strength: Any, **fields: Any) -> dict[str, Any]:
    return {"kind": "add", "vector": inline(ALTERNATING), "strength": strength, **fields}


def many(item: dict[str, Any], **rest: Any) -> dict[str, Any]:
    """So often at every layer that what one of them may do overflows in the end."""
    return {"interventions": [item | {"layers": "all"}] * 6, **rest}


RUNS_OVER = {
    "relative": many(add({"norm": 1e14})),
    "the first token alone": many(add({"norm": 1e14}), where={"positions": [[0, 1]]}),
    "what is generated alone": many(add({"norm": 1e14}), where={"phases": ["generation"]}),
    "ablated": many({"kind": "ablate", "vector": "plain", "strength": 1e14}),
    "behind a gate": many(add({"norm": 1e14}), when={"vector": "plain", "below": 2.0}),
    "scaled features": one(
        {"kind": "clamp", "sae": "steep", "features": [1, 2, 3], "value": 1e9, "mode": "scale"}
    ),
    "an adapter": one({"kind": "low_rank", "adapter": "wild"}),
}


def assert_kept(
    engine: TransformersEngine, beside: list[Completion], alone: list[Completion]
) -> None:
    """That neighbours answer as without the others, to the bit. In a mixture of experts another row
    may make an expert's batch larger, and some processors then round all of it otherwise, with or
    without Steer."""
    if "mlp_act" in engine.info.sites:
        assert beside == alone
        return
    assert [replace(one, logprobs=()) for one in beside] == [
        replace(one, logprobs=()) for one in alone
    ]
    for mine, theirs in zip(beside, alone, strict=True):
        said = [[entry.logprob for entry in each.logprobs] for each in (mine, theirs)]
        assert said[0] == pytest.approx(said[1], abs=1e-4)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", RUNS_OVER)
def test_a_request_whose_numbers_run_over_ends_alone(
    engine: TransformersEngine, name: str, temperature: float
) -> None:
    plans = plans_of(engine, LIBRARY)
    sampling = SamplingParams(max_tokens=5, temperature=temperature, seed=1, ignore_eos=True)
    plan = plans.plan(parse_spec(RUNS_OVER[name]))
    bad = GenerationRequest("bad", (5, 6, 7), sampling, plan)
    (outcome,), beside, alone = neighbours_of(engine, plans, [bad])
    assert isinstance(outcome, NotFinite)
    assert (outcome.code, outcome.status) == ("not_finite", 400)
    assert_kept(engine, beside, alone)
    assert engine.stats().slots_in_use == 0


REFUSED = {
    "no float32": (add(1e308), "/strength"),
    "no norm in float32": (add(3e38), "/strength"),
    "a relative one": (add({"norm": 1e300}), "/strength"),
    "project": ({"kind": "project", "vector": "plain", "value": 1e39}, "/value"),
    "ablate": ({"kind": "ablate", "vector": "plain", "strength": -1e39}, "/strength"),
    "swap": ({"kind": "swap", "remove": "plain", "add": "other", "strength": 1e39}, "/strength"),
    "clamp": ({"kind": "clamp", "sae": "standard", "features": [1], "value": 1e39}, "/value"),
    "concept": (
        {"kind": "concept", "sae": "standard", "text": "w5", "strength": 1e39},
        "/strength",
    ),
    "patch": ({"kind": "patch", "vector": "long"}, "/vector"),
    "what the card says": ({"kind": "add", "vector": "long"}, "/vector"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_an_edit_that_must_run_over_is_refused(llama: TransformersEngine, name: str) -> None:
    item, param = REFUSED[name]
    with pytest.raises(NotFinite) as caught:
        plans_of(llama, LIBRARY).plan(parse_spec(one(item)))
    assert caught.value.param == f"/interventions/0{param}"


@pytest.mark.parametrize(
    ("dtype", "strength", "fits"),
    [("float16", 6e4, True), ("float16", 1e5, False), ("bfloat16", 1e5, True)],
)
def test_an_edit_must_fit_the_models_dtype(
    llama: TransformersEngine, dtype: str, strength: float, fits: bool
) -> None:
    model = replace(llama.info, dtype=dtype)
    plans = PlanCache(LIBRARY, model, llama.capabilities)
    if fits:
        plans.plan(parse_spec(one(add(strength))))
        return
    with pytest.raises(NotFinite, match="float16 ends at"):
        plans.plan(parse_spec(one(add(strength))))


@pytest.mark.parametrize("size", [1e-45, 1e-30, 1e30, 3e38])
@pytest.mark.parametrize("kind", ["add", "ablate", "patch"])
def test_a_vector_without_a_norm_is_refused(
    llama: TransformersEngine, kind: str, size: float
) -> None:
    spec = one({"kind": kind, "vector": inline(ALTERNATING * size)})
    with pytest.raises(SteerError) as caught:
        plans_of(llama, LIBRARY).plan(parse_spec(spec))
    assert caught.value.code == "norm_out_of_range"
    assert caught.value.param == "/interventions/0/vector"


@pytest.mark.parametrize("bound", [2**63, -(2**63) - 1, 2**70, 2**53])
@pytest.mark.parametrize(
    "spec",
    [
        lambda n: one(add(1.0), where={"positions": [[n, None]]}),
        lambda n: one(add(1.0), where={"positions": [[0, n]]}),
        lambda n: one(add(1.0), where={"except": {"positions": [[n, None]]}}),
        lambda n: one(add(1.0), where={"tokens": [n]}),
        lambda n: one(add(1.0, layers=[n])),
        lambda n: one({"kind": "clamp", "sae": "standard", "features": [n], "value": 1.0}),
        lambda n: one(add(1.0), when={"vector": "plain", "above": 0.0, "layer": n}),
        lambda n: one({"kind": "add", "vector": {**inline(ALTERNATING), "layer": n}}),
    ],
)
def test_integers_beyond_those_of_json_are_refused(
    spec: Callable[[int], dict[str, Any]], bound: int
) -> None:
    with pytest.raises(SteerError) as caught:
        parse_spec(spec(bound))
    assert caught.value.code == "invalid_spec"
    assert caught.value.param is not None


HARMLESS = {
    "the last integers": Hostile(
        (5, 6, 7), one(add(1.0), where={"positions": [[-(2**53) + 1, 2**53 - 1]]})
    ),
    "no temperature to speak of": Hostile(
        (5, 6, 7), None, SamplingParams(max_tokens=5, temperature=1e-40, ignore_eos=True)
    ),
    "the least of all temperatures": Hostile(
        (5, 6, 7), None, SamplingParams(max_tokens=5, temperature=5e-324, ignore_eos=True)
    ),
    "the least temperature that is drawn": Hostile(
        (5, 6, 7), None, SamplingParams(max_tokens=5, temperature=1e-5, seed=1, ignore_eos=True)
    ),
    "no mass to speak of": Hostile(
        (5, 6, 7), None, SamplingParams(max_tokens=5, top_p=1e-300, seed=1, ignore_eos=True)
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_extremes_that_mean_something_are_answered(llama: TransformersEngine, name: str) -> None:
    plans = plans_of(llama, LIBRARY)
    request = admitted(llama, plans, HARMLESS[name])
    assert isinstance(request, GenerationRequest)
    (outcome,), beside, alone = neighbours_of(llama, plans, [request])
    assert isinstance(outcome, Completion)
    assert beside == alone
    if request.plan is None:
        greedy = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        (likeliest,) = llama.complete([GenerationRequest("greedy", request.prompt, greedy)])
        assert outcome.tokens == likeliest.tokens


def test_what_a_request_calls_fails_that_request_alone(llama: TransformersEngine) -> None:
    plans = plans_of(llama, LIBRARY)

    def stop(_: int) -> bool:
        raise ValueError("not a stop string")

    sampling = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
    plain = GenerationRequest("plain", (5, 6, 7), sampling)
    (whole,) = llama.complete([plain])
    with pytest.raises(EngineError, match="not a stop string"):
        llama.complete([GenerationRequest("bad", (5, 6, 7), sampling, stop=stop)])
    _, beside, alone = neighbours_of(llama, plans, [plain])
    assert beside == alone
    assert llama.complete([plain]) == [whole]


def test_a_model_that_is_not_finite_itself_is_no_fault_of_the_client() -> None:
    model = build("llama")
    asked = GenerationRequest("plain", (5, 6), SamplingParams(max_tokens=2))
    with TransformersEngine(model, None) as engine:
        with torch.no_grad():
            model.lm_head.weight[5] = math.nan  # after the proof, which would refuse it
        with pytest.raises(EngineError) as caught:
            engine.complete([asked])
    assert caught.value.code == "not_finite"


def test_a_model_that_is_not_finite_from_the_beginning_does_not_start() -> None:
    model = build("llama")
    with torch.no_grad():
        model.lm_head.weight[5] = math.nan
    with pytest.raises(Unsupported, match=r"LlamaForCausalLM.*not finite"):
        TransformersEngine(model, None)


def test_readings_that_are_not_finite_are_refused(engine: TransformersEngine) -> None:
    plans = plans_of(engine, LIBRARY)
    spec = parse_spec(RUNS_OVER["the first token alone"])
    plan, points = plans.plan(spec), (HookPoint(2),)
    prompts = [(5, 6, 7), (8, 9)]
    for capture in (
        CaptureRequest(prompts, points, plans=[None, plan]),
        CaptureRequest(prompts, plans=[plan, None], logits="last"),
        CaptureRequest(prompts, plans=[plan, None], logits="all"),
    ):
        with pytest.raises(NotFinite):
            engine.capture(capture)
    with pytest.raises(NotFinite):
        logit_lens(engine, LogitLensRequest(text="w5 w6", steering=spec), plans=plans)
    assert engine.capture(CaptureRequest(prompts, points))


# Fuzz


def test_no_request_harms_another(
    llama: TransformersEngine, request: pytest.FixtureRequest
) -> None:
    """`pytest --requests 20000` draws as many; the answers are counted on stdout (`-s`)."""
    wanted = request.config.getoption("--requests")
    plans = plans_of(llama, LIBRARY, size=4 * AT_ONCE)
    counts: dict[str, int] = {}

    # Not shrunk: each try is a batch of its own, and the failing request is in the message.
    @settings(max_examples=max(1, wanted // AT_ONCE), phases=[Phase.generate])
    @given(st.lists(requests, min_size=AT_ONCE - len(KNOWN), max_size=AT_ONCE - len(KNOWN)))
    def check(drawn: list[Hostile]) -> None:
        drawn = [*(Hostile((5, 6, 7), spec) for spec in KNOWN.values()), *drawn]
        tried = [admitted(llama, plans, hostile) for hostile in drawn]
        running = [found for found in tried if isinstance(found, GenerationRequest)]
        outcomes, beside, alone = neighbours_of(llama, plans, running)
        for outcome in [found for found in tried if isinstance(found, SteerError)] + outcomes:
            code = "answered" if isinstance(outcome, Completion) else outcome.code
            counts[code] = counts.get(code, 0) + 1
            assert not isinstance(outcome, EngineError), outcome
        assert beside == alone
        assert llama.stats().slots_in_use == 0

    check()
    print(sum(counts.values()), "requests:", counts)
    assert {"answered", *KNOWN} <= counts.keys()
