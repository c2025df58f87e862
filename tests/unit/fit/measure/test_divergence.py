"""KL between next-token distributions, against numpy and against what the engine generates."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SpecError, Unsupported
from steer.fit.measure.answers import Answer, answers_under
from steer.fit.measure.divergence import (
    References,
    anchored,
    divergences,
)
from steer.fit.measure.scoring import Score
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts.roles import chat_roles
from steer.readouts.measures import kl_divergence, log_total
from steer.spec import parse_spec

PROMPTS = ["one", "two words", "and three more"]
SAMPLING = SamplingParams(max_tokens=6, temperature=0, logprobs=0, ignore_eos=True)
WHERES: list[Any] = [
    {"phases": ["prompt"], "positions": [[-1, None]]},
    {"positions": [[-1, None]]},
    {"phases": ["generation"]},
    {"positions": [[0, -1]], "except": {"positions": [[1, 2]]}},
    None,
]


def plan_of(engine: TransformersEngine, strength: float, where: Any, **item: Any) -> SteeringPlan:
    generator = torch.Generator().manual_seed(1)
    vector = ControlVector.of({1: torch.randn(32, generator=generator)}, name="v")
    cache = PlanCache(MemoryLibrary({"v": vector}), engine.info, engine.capabilities)
    spec = {"kind": "add", "vector": "v", "strength": strength, **item}
    return cache.plan(parse_spec({"interventions": [spec | ({"where": where} if where else {})]}))


def answered(engine: TransformersEngine, plan: SteeringPlan | None = None) -> tuple[Answer, ...]:
    [answers] = answers_under(engine, [PROMPTS], [plan], lambda _: Score(0.0), sampling=SAMPLING)
    return answers


@pytest.mark.parametrize("where", WHERES)
def test_read_again_the_model_says_the_same(engine: TransformersEngine, where: Any) -> None:
    """A steered answer, read as one prompt under the anchored plan, has the log-probabilities it
    was generated with: the edits fall on the same tokens."""
    plan = plan_of(engine, 1.5, where)
    requests = [
        GenerationRequest(str(n), tuple(engine.tokenizer.encode(p)), SAMPLING, plan)
        for n, p in enumerate(PROMPTS)
    ]
    for request, done in zip(requests, engine.complete(requests), strict=True):
        length = len(request.prompt)
        whole = request.prompt + done.tokens
        [read] = engine.capture(
            CaptureRequest([whole], plans=[anchored(plan, length)], logits="all")
        )
        assert read.logits is not None
        chances = read.logits[length - 1 : -1].double().log_softmax(-1)
        found = chances[torch.arange(len(done.tokens)), list(done.tokens)].tolist()
        assert found == pytest.approx([one.logprob for one in done.logprobs], abs=2e-4)


def test_the_kl_is_that_of_the_distributions(engine: TransformersEngine) -> None:
    plan = plan_of(engine, 2.0, WHERES[1])
    answers = answered(engine)
    found = divergences(engine, answers, [plan, plan_of(engine, 0.5, WHERES[1])], batch=2)
    assert found.shape == (2, len(PROMPTS))
    assert found.dtype == torch.float64
    assert bool((found[0] > found[1]).all())
    assert bool((found[1] > 0).all())
    for column, answer in enumerate(answers):
        whole = answer.prompt + answer.tokens
        place = len(answer.prompt) - 1
        rows = []
        for one in (anchored(plan, len(answer.prompt)), None):
            [read] = engine.capture(CaptureRequest([whole], plans=[one], logits="all"))
            assert read.logits is not None
            logits = read.logits[place:].double().numpy()
            rows.append(np.exp(logits) / np.exp(logits).sum(-1, keepdims=True))
        p, q = rows
        assert len(p) == len(answer.tokens) + 1
        wanted = (p * np.log(p / q)).sum(-1).mean()
        assert float(found[0, column]) == pytest.approx(wanted, rel=1e-5)


def test_no_edit_has_no_kl(engine: TransformersEngine) -> None:
    answers = answered(engine)
    assert not divergences(engine, answers, [plan_of(engine, 0.0, None)]).any()


def test_kl_where_it_is_known() -> None:
    p = torch.tensor([[0.5, 0.25, 0.25], [1.0, 0.0, 0.0]], dtype=torch.float64)
    q = torch.full((2, 3), 1 / 3, dtype=torch.float64)
    entropies = torch.tensor([1.5 * np.log(2), 0.0], dtype=torch.float64)
    wanted = np.log(3) - entropies
    assert torch.allclose(kl_divergence(p.log(), q.log()), wanted, atol=1e-12)
    # A constant on all logits changes no probability.
    assert torch.allclose(kl_divergence(p.log() + 50, q.log() - 7), wanted, atol=1e-12)


def test_kl_of_far_logits_is_that_of_their_probabilities() -> None:
    generator = torch.Generator().manual_seed(0)
    p, q = (30 * torch.randn(5, 400, generator=generator) for _ in range(2))
    p[0, :3], q[0, 1:4] = -torch.inf, -torch.inf  # ruled out by one, by the other, by both
    p[0, 3] = -torch.inf
    a, b = p.double().log_softmax(-1), q.double().log_softmax(-1)
    wanted = torch.where(a.exp() == 0, 0.0, a.exp() * (a - b)).sum(-1)
    assert torch.allclose(kl_divergence(p, q), wanted, rtol=1e-12)
    assert torch.equal(kl_divergence(p, q, reference_total=log_total(q)), kl_divergence(p, q))
    assert not kl_divergence(p, p).any()
    assert kl_divergence(q, p).isinf().tolist() == [True] + [False] * 4


def test_gated_specs_are_refused(engine: TransformersEngine) -> None:
    plan = plan_of(engine, 1.0, None, when={"vector": "v", "above": 0.1, "layer": 0})
    with pytest.raises(Unsupported) as caught:
        anchored(plan, 3)
    assert caught.value.code == "unsupported_gate"


@pytest.mark.parametrize(
    ("where", "fed"),
    [({"positions": [[-1, None]]}, [10, 18, 4 * 8]), (None, [18, 4 * 18])],
    ids=["on the answer alone", "on every token"],
)
def test_an_unsteered_prompt_is_read_once_under_all_plans(
    engine: TransformersEngine, where: Any, fed: list[int]
) -> None:
    """What is of interest is left, the six tokens and the two distributions around them; before it
    one row goes through the blocks below the first edit."""
    prompt = tuple(range(65, 77))
    answer = Answer(prompt, tuple(range(97, 103)), "")
    references = References(engine, [answer])
    plans = [plan_of(engine, strength, where) for strength in (0.5, 1.0, 1.5, 2.0)]
    alone = [references.divergences([plan])[0, 0] for plan in plans]
    references.divergences(plans)  # and the trial whether those blocks run apart
    seen: list[int] = []
    handle = engine._hooked.model.register_forward_pre_hook(
        lambda _m, _a, inputs: seen.append(inputs["input_ids"].numel()), with_kwargs=True
    )
    try:
        together = references.divergences(plans)[:, 0]
    finally:
        handle.remove()
    assert seen == fed
    torch.testing.assert_close(together, torch.stack(alone), rtol=1e-4, atol=1e-7)


def test_roles_are_those_of_the_chats_that_were_answered(engine: TransformersEngine) -> None:
    chats = [[{"role": "user", "content": text}] for text in PROMPTS]
    [answers] = answers_under(engine, [chats], [None], sampling=SAMPLING)
    references = References(engine, answers, batch=2)
    roles = [chat_roles(engine.tokenizer, one).ranges for one in chats]
    for n, answer in enumerate(answers):
        ((start, end, _),) = roles[n]
        for role, where in (
            ("user", {"positions": [[start, end]], "phases": ["prompt"]}),
            ("assistant", {"phases": ["generation"]}),
        ):
            plans = [plan_of(engine, 2.0, one) for one in ({"roles": [role]}, where)]
            found = divergences(engine, [answer], plans)[:, 0]
            assert found[0] > 0
            assert found[0] == pytest.approx(float(found[1]), rel=1e-6)
            again = references.divergences(plans[:1])[0, n]
            assert again == pytest.approx(float(found[0]), rel=1e-4)
    # Of a text nobody said anything.
    with pytest.raises(SpecError) as caught:
        divergences(engine, answered(engine), [plan_of(engine, 2.0, {"roles": ["user"]})])
    assert (caught.value.code, caught.value.param) == (
        "no_messages",
        "/interventions/0/where/roles",
    )


def test_what_becomes_of_every_token(engine: TransformersEngine) -> None:
    plans = [plan_of(engine, 2.0, WHERES[1]), plan_of(engine, 0.5, WHERES[1])]
    answers = answered(engine)
    found = References(engine, answers, batch=2).token_changes(plans)
    for row, plan in enumerate(plans):
        plain, steered = [], []
        for answer in answers:
            whole = answer.prompt + answer.tokens
            place = len(answer.prompt)
            for held, one in ((plain, None), (steered, anchored(plan, place))):
                [read] = engine.capture(CaptureRequest([whole], plans=[one], logits="all"))
                assert read.logits is not None
                held.append(read.logits[place - 1 :].double().log_softmax(-1))
        before, after = torch.cat(plain), torch.cat(steered)
        torch.testing.assert_close(found.change[row], (after - before).mean(0), atol=2e-4, rtol=0)
        torch.testing.assert_close(found.probability[row], after.exp().mean(0), atol=1e-5, rtol=0)
        torch.testing.assert_close(found.before, before.exp().mean(0), atol=1e-5, rtol=0)
