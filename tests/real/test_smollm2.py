"""A real model, as a new user would have it: SmolLM2-135M-Instruct in float32 on a CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from smollm2_specs import (
    LIBRARY,
    QUESTIONS,
    SAE_LAYER,
    SPECS,
    VALUE,
    chat,
    compiled,
    requests_for,
)

from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.engines.transformers.engine import TransformersEngine
from steer.fit.data.pairs import Pair, PairSet
from steer.fit.methods.fitting import fit
from steer.inspection.patchscopes.method import PatchscopeRequest, patchscope
from steer.model import HookPoint
from steer.spec import parse_spec

pytestmark = pytest.mark.slow

TOLERANCE = 2e-3
"""Of a log-probability: what another order of sums changes in float32."""


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    with TransformersEngine.load("smollm2", device="cpu", dtype="float32") as running:
        yield running


def test_it_is_the_model_that_it_says(engine: TransformersEngine) -> None:
    info = engine.info
    assert (info.name, info.own_name) == ("smollm2", "SmolLM2-135M-Instruct")
    assert (info.n_layers, info.d_model, info.vocab_size) == (30, 576, 49152)
    sampling = SamplingParams(max_tokens=24, temperature=0)
    (answer,) = engine.complete(
        [GenerationRequest("a", chat(engine, "What is the capital of France?"), sampling)]
    )
    assert engine.tokenizer.decode(answer.tokens) == "The capital of France is Paris."
    assert answer.finish == "stop"  # the model ended its turn


def test_a_mixed_batch_is_equal_to_each_alone(engine: TransformersEngine) -> None:
    requests = requests_for(engine, compiled(engine))
    together = engine.complete(requests)
    answers = {name: one.tokens for name, one in zip(("unsteered", *SPECS), together, strict=True)}
    for request, batched in zip(requests, together, strict=True):
        (alone,) = engine.complete([request])
        assert alone.tokens == batched.tokens, request.id
        assert alone.receipt == batched.receipt
        for mine, other in zip(alone.logprobs, batched.logprobs, strict=True):
            assert mine.logprob == pytest.approx(other.logprob, abs=TOLERANCE), request.id
    # The specs do something: the same questions, unsteered, are answered otherwise.
    plain = engine.complete([GenerationRequest(r.id, r.prompt, r.sampling) for r in requests])
    for name, one in zip(("unsteered", *SPECS), plain, strict=True):
        if name in ("add", "add a share of the norm", "clamp"):
            assert one.tokens != answers[name], name


def test_a_fitted_vector_tells_its_concept_and_turns_answers(engine: TransformersEngine) -> None:
    """Fitted on system prompts, read and added in the middle of the model."""
    cheerful, gloomy = "You are joyful and enthusiastic.", "You are gloomy and hopeless."
    pairs = [
        Pair(
            *(
                [{"role": "system", "content": who}, {"role": "user", "content": question}]
                for who in (cheerful, gloomy)
            )
        )
        for question in QUESTIONS
    ]
    vector = fit(engine, PairSet.of(pairs), name="joy", layers=(12, 14, 16, 18), held_out=0.34)
    assert vector.card.model == "SmolLM2-135M-Instruct"
    # On pairs that were held out.
    assert max(one.separation or 0 for one in vector.card.measures.values()) > 2
    plans = plans_of(engine, type(LIBRARY)(vectors={"joy": vector}))
    add = {"kind": "add", "vector": "joy", "strength": 2, "layers": [12, 14, 16, 18]}
    add["where"] = {"phases": ["prompt", "generation"]}
    plan = plans.plan(parse_spec({"interventions": [add]}))
    prompt = chat(engine, "How was your day?")
    sampling = SamplingParams(max_tokens=16, temperature=0)
    steered, plain = engine.complete(
        [GenerationRequest("s", prompt, sampling, plan), GenerationRequest("p", prompt, sampling)]
    )
    assert steered.tokens != plain.tokens
    assert steered.receipt is not None
    fed = len(prompt) + len(steered.tokens) - (steered.finish == "length")
    assert steered.receipt.tokens_steered == fed


def test_a_clamp_moves_the_state_by_what_its_feature_lacks(engine: TransformersEngine) -> None:
    sae, point = LIBRARY.sae("planted"), HookPoint(SAE_LAYER)
    prompt = chat(engine, "Name three colours.")
    plan = compiled(engine)["clamp"]
    plain, clamped = (
        engine.capture(CaptureRequest([prompt], (point,), (-1,), [one]))[0].states[point].float()
        for one in (None, plan)
    )
    # A standard SAE's activation is what of the projection is above 0.
    active = (plain @ sae.W_enc).squeeze()[1].clamp(min=0)
    wanted = (VALUE - active) * sae.W_dec[1]
    assert torch.allclose((clamped - plain).squeeze(), wanted, atol=0.05)


def test_late_states_say_the_next_token_through_another_prompt(engine: TransformersEngine) -> None:
    """2401.06102, section 4.1: the identity prompt reads from a late layer what the model says."""
    source = {"text": "Paris is the capital of France. Rome is the capital of Italy. Berlin is the"}
    result = patchscope(
        engine,
        PatchscopeRequest(
            source=source, positions=(-1,), layers=(1, 28), expect="next_token", max_tokens=0
        ),
    )
    hits = {cell.layer: cell.hit for cell in result.cells}
    assert hits == {1: False, 28: True}
