"""What heads attend to, as a capture tells it."""

from __future__ import annotations

import threading

import pytest
import torch
from tiny_families import build_family
from tiny_models import tiny_tokenizer
from transformers import AttentionInterface

from steer.engines.base import CaptureRequest
from steer.engines.journal import JournaledEngine
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import SteerError, Unsupported
from steer.model import HookPoint

PROMPTS = [list(range(3, 9)), list(range(5, 25)), [7, 7, 7]]
POINTS = (HookPoint(1, "head_out"), HookPoint(2))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt2"])
def test_attention_is_that_of_each_prompt_and_changes_no_state(name: str) -> None:
    with TransformersEngine(build_family(name), tiny_tokenizer(), rows=3, slots=2) as engine:
        plain = engine.capture(CaptureRequest(PROMPTS, POINTS))
        told = engine.capture(CaptureRequest(PROMPTS, POINTS, attention=(1, 2)))
        last = engine.capture(CaptureRequest(PROMPTS, POINTS, (-1,), attention=(1,)))
        kept = JournaledEngine(engine).capture(
            CaptureRequest(PROMPTS[:1], logprobs=0, attention=(1,))
        )
        early = engine.capture(CaptureRequest(PROMPTS[:1], (HookPoint(0),), attention=(2,)))
    assert kept[0].attention.keys() == {1}
    assert (early[0].attention.keys(), early[0].states.keys()) == ({2}, {HookPoint(0)})
    for prompt, before, after, end in zip(PROMPTS, plain, told, last, strict=True):
        for point in POINTS:
            assert after.states[point] == pytest.approx(before.states[point], abs=1e-5)
        assert after.attention.keys() == {1, 2}
        assert not before.attention
        one = after.attention[1]
        assert one.weights.shape == (4, len(prompt), len(prompt))
        assert one.weights.sum(-1) == pytest.approx(torch.ones(4, len(prompt)), abs=1e-5)
        assert one.weights.triu(1).abs().max() == 0.0
        assert end.attention[1].weights == pytest.approx(one.weights[:, -1:], abs=1e-6)
        made = (one.weights @ one.values).transpose(0, 1).flatten(1)
        assert made == pytest.approx(after.states[POINTS[0]], abs=1e-5)


def test_the_interface_is_given_back_and_other_threads_attend_as_always() -> None:
    original = AttentionInterface.get_interface
    seen: list[object] = []

    def plainly(*_: object) -> str:
        return "attends"

    with TransformersEngine(build_family("llama"), tiny_tokenizer(), rows=2, slots=2) as engine:
        block = engine._hooked.map.targets[HookPoint(2)].module

        def elsewhere(*_: object) -> None:
            look = AttentionInterface().get_interface
            asked = threading.Thread(target=lambda: seen.append(look("eager", plainly)))
            asked.start()
            asked.join()

        handle = block.register_forward_hook(elsewhere)
        asked = CaptureRequest(PROMPTS[:1], (HookPoint(2),), logits="last", attention=(1,))
        engine.capture(asked)
        handle.remove()
        with pytest.raises(SteerError, match="outside a prompt"):
            engine.capture(CaptureRequest(PROMPTS[:1], (HookPoint(2),), (99,), attention=(1,)))
    assert seen == [plainly]
    assert AttentionInterface.get_interface is original


def test_a_layer_that_attends_in_its_own_way_is_named() -> None:
    with (
        TransformersEngine(build_family("gpt-j"), tiny_tokenizer(), rows=2, slots=2) as engine,
        pytest.raises(Unsupported, match="in layer 1, so what its heads") as caught,
    ):
        engine.capture(CaptureRequest(PROMPTS[:1], attention=(1,)))
    assert caught.value.code == "no_attention"
