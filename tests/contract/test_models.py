"""Models that are not rows of plain keys and values: served exactly, or refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from artefacts import random_vector
from shrunken import VOCABULARY, tiny
from tiny_models import build
from torch import nn

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.transformers.structure.calls import at_rest, watching
from steer.engines.transformers.structure.decoder import decoder_blocks
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import parse_spec

ALONE = (
    "MambaForCausalLM",
    "FalconH1ForCausalLM",
    "Qwen3_5ForCausalLM",
    "RecurrentGemmaForCausalLM",
)
GREEDY = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True)
PROMPTS = [(20, 21, 22), (30, 31, 32, 33, 34, 35, 36, 37), (40, 41, 42, 43, 44)]


def _plan(engine: TransformersEngine, **where: Any) -> SteeringPlan:
    vector = random_vector(5, 1, width=engine.info.d_model)
    plans = PlanCache(MemoryLibrary({"v": vector}), engine.info, engine.capabilities)
    item = {"kind": "add", "vector": "v", **where}
    return plans.plan(parse_spec({"interventions": [item]}))


@pytest.mark.parametrize("name", ALONE)
def test_sequences_that_cannot_share_a_pass_take_turns(name: str) -> None:
    """Together, whoever joins when, each is what it is alone, to the receipt."""
    with TransformersEngine(tiny(getattr(transformers, name)), None, rows=2, slots=4) as engine:
        plan = _plan(engine, where={"phases": ["generation"]})
        requests = [
            GenerationRequest(f"{n}", prompt, GREEDY, plan if n else None)
            for n, prompt in enumerate(PROMPTS)
        ]
        alone = [engine.complete([request])[0] for request in requests]
        together = engine.complete(requests)
    assert [one.tokens for one in together] == [one.tokens for one in alone]
    assert [one.receipt for one in together] == [one.receipt for one in alone]
    assert together[1].receipt is not None
    assert together[1].receipt.tokens_steered == GREEDY.max_tokens - 1


@pytest.mark.parametrize("name", [*ALONE, "Gemma4ForCausalLM"])
def test_states_at_one_position_are_those_of_that_token(name: str) -> None:
    """Also where later blocks would be computed for the last tokens alone."""
    with TransformersEngine(tiny(getattr(transformers, name)), None, rows=2, slots=2) as engine:
        points = tuple(HookPoint(layer) for layer in range(engine.info.n_layers))
        all_states, first = (
            engine.capture(CaptureRequest([PROMPTS[1], PROMPTS[0]], points, positions=positions))
            for positions in (None, (0,))
        )
        (alone,) = engine.capture(CaptureRequest([PROMPTS[0]], points))
    for point in points:
        for one, every in zip(first, all_states, strict=True):
            assert torch.equal(one.states[point][0], every.states[point][0])
        assert torch.allclose(all_states[1].states[point], alone.states[point], atol=1e-4)


@pytest.mark.parametrize("name", [*ALONE, "Gemma3ForCausalLM", "GPT2LMHeadModel"])
def test_prompts_that_begin_alike_say_what_each_says_alone(name: str) -> None:
    """Whatever the engine computes once for them, windows and recurrent states included."""
    with TransformersEngine(tiny(getattr(transformers, name)), None, rows=4, slots=4) as engine:
        plan = _plan(engine, where={"phases": ["prompt"], "positions": [[-2, None]]})
        prompts = [PROMPTS[1], (*PROMPTS[1][:-2], 41, 37), PROMPTS[1]]
        plans = [None, plan, plan]
        together = engine.capture(CaptureRequest(prompts, plans=plans, logits="last"))
        for prompt, one, said in zip(prompts, plans, together, strict=True):
            (alone,) = engine.capture(CaptureRequest([prompt], plans=[one], logits="last"))
            torch.testing.assert_close(said.logits, alone.logits, rtol=1e-4, atol=1e-4)


def test_the_blocks_are_the_text_decoders() -> None:
    model: Any = tiny(transformers.Qwen2VLForConditionalGeneration)
    assert _blocks(model) == list(model.model.language_model.layers)


def test_a_block_that_images_alone_reach_keeps_its_number() -> None:
    """Around it there is one place in the stream, where edits act in the order of the points."""
    model: Any = tiny(transformers.MllamaForConditionalGeneration)
    layers = list(model.model.language_model.layers)
    (skipped,) = (n for n, layer in enumerate(layers) if hasattr(layer, "cross_attn"))
    with TransformersEngine(model, None, rows=2, slots=4) as engine:
        assert engine.info.n_layers == len(layers)
        vector = random_vector(7, skipped, width=engine.info.d_model)
        around = HookPoint(skipped), HookPoint(skipped + 1, "resid_pre")
        plans = PlanCache(MemoryLibrary({"v": vector}), engine.info, engine.capabilities)
        plan = plans.plan(parse_spec({"interventions": [{"kind": "add", "vector": "v"}]}))
        (plain,), (after,) = (
            # The later point first, so that its hook is there before the other's.
            engine.capture(CaptureRequest([PROMPTS[0]], tuple(reversed(around)), plans=[one]))
            for one in (None, plan)
        )
    for point in around:
        moved = after.states[point] - plain.states[point]
        assert torch.allclose(moved, vector[skipped].expand_as(moved), atol=1e-5), point


def _blocks(model: nn.Module) -> list[nn.Module]:
    with at_rest(model), watching(model.modules()) as seen:
        model(input_ids=torch.arange(1, 6)[None], use_cache=False)
    return decoder_blocks(model, seen)


def _offloaded() -> nn.Module:
    model = build("llama")
    model.model.layers[1].to("meta")
    return model


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "offloaded": (_offloaded, "model.layers.1.self_attn.q_proj.weight is not in memory"),
    "data parallel": (lambda: nn.DataParallel(build("llama")), "give the model in .module"),
    "no transformers model": (lambda: nn.Linear(2, 2), "no PreTrainedModel"),
    "encoder": (lambda: tiny(transformers.BertLMHeadModel), "it is an encoder"),
    "encoder-decoder": (
        lambda: tiny(transformers.BartForConditionalGeneration),
        "it is an encoder-decoder model",
    ),
    "several streams": (lambda: tiny(transformers.Gemma3nForCausalLM), "one residual stream"),
    "no cache": (lambda: tiny(transformers.OpenAIGPTLMHeadModel), "it keeps no cache"),
    "image needed": (lambda: tiny(transformers.BlipForConditionalGeneration), "pixel_values"),
    "tokens of its own": (lambda: tiny(transformers.CpmAntForCausalLM), "one residual stream"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_served_is_refused_at_start_with_its_reason(kind: str) -> None:
    make, reason = REFUSED[kind]
    model = make()
    with pytest.raises(Unsupported, match=reason) as refusal:
        TransformersEngine(model, None)
    assert refusal.value.code == "unsupported_model"
    assert type(model).__name__ in refusal.value.message


@pytest.mark.parametrize("batching", ["rolling", "packed"])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("MambaForCausalLM", "LinearAttentionLayer"),
        ("BartForCausalLM", "other logits than its own"),
    ],
)
def test_a_form_that_is_not_exact_is_refused_where_it_is_asked_for(
    name: str, reason: str, batching: Any
) -> None:
    with pytest.raises(Unsupported, match=reason) as refusal:
        TransformersEngine(tiny(getattr(transformers, name)), None, batching=batching)
    assert refusal.value.code == "shared_batches_unavailable"


def test_prompts_read_both_ways_have_no_gradients() -> None:
    model = tiny(transformers.PaliGemmaForConditionalGeneration)
    assert not TransformersEngine(model, None).capabilities.gradients
    assert TransformersEngine(build("llama"), None).capabilities.gradients


def test_hooks_that_see_other_tokens_than_were_fed_refuse() -> None:
    """Gemma 4 computes its later blocks for as many tokens as logits are asked for."""
    engine = TransformersEngine(tiny(transformers.Gemma4ForCausalLM), None, rows=2, slots=2)
    last = HookPoint(engine.info.n_layers - 1)
    ids = torch.arange(1, VOCABULARY // 9)[None]
    with torch.inference_mode(), pytest.raises(Exception, match="computes 1 of 10 tokens"):
        engine._hooked.forward(None, [last], input_ids=ids, use_cache=True, logits_to_keep=1)


def test_the_proof_does_not_follow_the_models_own_ways_of_choosing() -> None:
    model: Any = build("llama")
    model.generation_config.update(num_beams=3, num_return_sequences=2, do_sample=True, top_k=5)
    engine = TransformersEngine(model, None, batching="rolling")
    assert engine.info.architecture == "LlamaForCausalLM"
