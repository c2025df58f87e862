"""Texts, messages and schedules on a running engine: alone, in a crowd, and in pieces."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from artefacts import random_roles, random_vector, span_vocabulary
from float64_reference import Seen, chosen
from tiny_models import LAYERS, VOCABULARY, WIDTH

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Completion, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SpecError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import ROLES, parse_spec

TinyModel = Callable[[str], torch.nn.Module]

PIECES = span_vocabulary(VOCABULARY)
WHERES: dict[str, dict[str, Any]] = {
    "after": {"after": ["<a>", "ba<"]},
    "before": {"before": ["<<", [5]]},
    "between": {"between": [["<", ">"], ["bb", "a"]]},
    "outside": {"outside": [["<a>", "</a>"]]},
    "nth": {"every": {"nth": 2}},
    "first": {"every": {"first": 3}},
    "roles": {"roles": ["user", "assistant"]},
    "a role's words after a text": {"roles": ["assistant"], "after": ["a"]},
    "an answer but for a span": {
        "phases": ["generation"],
        "except": {"between": [["a", "b"]]},
    },
}


@pytest.fixture
def llama(tiny_model: TinyModel) -> TransformersEngine:
    return TransformersEngine(tiny_model("llama"), None, rows=5, slots=4, chunk=64)


@pytest.fixture
def engine(llama: TransformersEngine) -> Iterator[TransformersEngine]:
    with llama as running:
        yield running


def plans(engine: TransformersEngine) -> dict[str, SteeringPlan]:
    vectors = {f"v{n}": random_vector(n, *range(LAYERS), width=WIDTH) for n in range(2)}
    able = replace(engine.capabilities, roles=ROLES)
    cache = PlanCache(MemoryLibrary(vectors), engine.info, able, vocabulary=lambda: PIECES)
    item = {"kind": "add", "vector": "v0", "layers": [0, 1], "strength": 2}
    always = {"kind": "ablate", "vector": "v1", "layers": [1], "where": {"phases": ["prompt"]}}
    return {
        name: cache.plan(parse_spec({"interventions": [item, always], "where": where}))
        for name, where in WHERES.items()
    }


def requests_for(engine: TransformersEngine, count: int = 27) -> list[GenerationRequest]:
    draw, compiled, found = random.Random(7), plans(engine), []
    for n in range(count):
        name = list(WHERES)[n % len(WHERES)]
        prompt = tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randint(1, 30)))
        sampling = SamplingParams(
            max_tokens=draw.randint(6, 18), temperature=0, logprobs=1, ignore_eos=True
        )
        roles = random_roles(draw, len(prompt))
        found.append(
            GenerationRequest(f"{n} {name}", prompt, sampling, compiled[name], roles=roles)
        )
    return found


def assert_same(mine: Completion, other: Completion) -> None:
    assert mine.tokens == other.tokens
    for a, b in zip(mine.logprobs, other.logprobs, strict=True):
        assert abs(a.logprob - b.logprob) <= 1e-4
    assert mine.receipt == other.receipt


def test_receipts_equal_a_search_in_the_text_and_a_crowd_each_alone(
    engine: TransformersEngine,
) -> None:
    requests = requests_for(engine)
    for request, done in zip(requests, engine.complete(requests), strict=True):
        receipt, plan = done.receipt, request.plan
        assert receipt is not None
        assert plan is not None
        fed = [*request.prompt, *done.tokens[:-1]]
        seen = Seen.of(fed, PIECES, request.roles)
        touched = [
            any(
                chosen(plan.spec, item, n, len(request.prompt), token, seen)
                for item in plan.spec.interventions
            )
            for n, token in enumerate(fed)
        ]
        assert receipt.tokens_steered == sum(touched), request.id
        assert_same(done, engine.complete([request])[0])


def test_pieces_of_prompts_change_nothing(
    engine: TransformersEngine, tiny_model: TinyModel
) -> None:
    requests = requests_for(engine)
    whole = engine.complete(requests)
    with TransformersEngine(engine._hooked.model, None, rows=5, slots=4, chunk=3) as parted:
        for mine, other in zip(parted.complete(requests), whole, strict=True):
            assert_same(mine, other)


@pytest.mark.parametrize("name", [name for name in WHERES if name not in ("nth", "first")])
def test_a_capture_of_what_was_said_sees_the_states_that_said_it(
    engine: TransformersEngine, name: str
) -> None:
    """A text is met in prompt and answer as in one sequence; only what is said of phases
    differs."""
    requests = [one for one in requests_for(engine) if one.id.split(" ", 1)[1] == name]
    for request, done in zip(requests, engine.complete(requests), strict=True):
        plan, roles = request.plan, request.roles
        assert plan is not None
        assert roles is not None
        length, whole = len(request.prompt), (*request.prompt, *done.tokens[:-1])
        said = replace(
            roles, length=len(whole), ranges=(*roles.ranges, (length, len(whole), "assistant"))
        )
        anchored = replace(
            plan,
            rules=tuple(
                replace(one, selection=one.selection.anchored(length)) for one in plan.rules
            ),
            fingerprint=f"{plan.fingerprint} {request.id}",
        )
        (read,) = engine.capture(
            CaptureRequest([whole], plans=[anchored], roles=[said], logits="all")
        )
        assert read.logits is not None
        greedy = read.logits[length - 1 :].argmax(-1).tolist()
        assert tuple(greedy) == done.tokens


def test_a_prompt_without_messages_has_no_roles(engine: TransformersEngine) -> None:
    plan = plans(engine)["roles"]
    with pytest.raises(SpecError) as caught:
        engine.complete([GenerationRequest("text", (5, 6), plan=plan)])
    assert (caught.value.code, caught.value.param) == ("no_messages", "/where/roles")
    with pytest.raises(SpecError) as caught:
        engine.capture(CaptureRequest([(5, 6)], (HookPoint(0),), plans=[plan]))
    assert caught.value.code == "no_messages"
