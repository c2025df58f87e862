"""Requests with an adapter on the transformers engine: what PEFT computes, and nothing of it in the
requests beside them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
import torch
from artefacts import random_lora
from lora_adapters import write_adapter
from steer_vectors import LIBRARY
from transformers import AutoModelForCausalLM

from steer.artefacts.lora import Lora
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.lora import check_lora
from steer.engines.transformers.engine import TransformersEngine
from steer.errors import Unsupported
from steer.formats.adapters.peft import read_peft
from steer.formats.options import ImportOptions

MODEL = LIBRARY / "demo" / "model"
SAMPLING = SamplingParams(max_tokens=6, temperature=0, logprobs=1, ignore_eos=True)
PROMPTS = [(5, 9, 200, 31), tuple(range(100, 117)), (7,)]


@pytest.fixture(scope="module")
def engine() -> Any:
    with TransformersEngine.load(MODEL, name="steer-demo", rows=8, slots=8) as running:
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    root = tmp_path_factory.mktemp("adapters")
    return [write_adapter(root / str(seed), MODEL, seed=seed) for seed in (0, 1)]


@pytest.fixture(scope="module")
def loras(folders: list[Path]) -> list[Lora]:
    options = ImportOptions(source="activation-oracle")
    return [read_peft(folder, options).lora for folder in folders]


def asked(prompt: tuple[int, ...], lora: Lora | None = None) -> GenerationRequest:
    return GenerationRequest("x", prompt, SAMPLING, lora=lora)


def test_it_says_what_peft_makes_of_the_model(
    engine: Engine, folders: list[Path], loras: list[Lora]
) -> None:
    from peft import PeftModel

    for folder, lora in zip(folders, loras, strict=True):
        base = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        model = PeftModel.from_pretrained(base, folder).eval()
        done = engine.complete([asked(prompt, lora) for prompt in PROMPTS])
        for prompt, mine in zip(PROMPTS, done, strict=True):
            tokens = list(prompt)
            for token, logprob in zip(mine.tokens, mine.logprobs, strict=True):
                with torch.no_grad():
                    logits = model(input_ids=torch.tensor([tokens])).logits[0, -1]
                assert token == int(logits.argmax())
                wanted = float(logits.float().log_softmax(-1)[token])
                assert logprob.logprob == pytest.approx(wanted, abs=1e-4)
                tokens.append(token)


def test_adapters_and_none_in_one_call_keep_to_themselves(
    engine: Engine, loras: list[Lora]
) -> None:
    every = [asked(prompt, lora) for prompt in PROMPTS for lora in (None, *loras)]
    together = engine.complete(every)
    firsts = {one.logprobs[0].logprob for one in together}
    assert len(firsts) == len(every), "an adapter changes nothing"
    for request, mine in zip(every, together, strict=True):
        alone = engine.complete([request])[0]
        assert mine.tokens == alone.tokens
        for one, other in zip(mine.logprobs, alone.logprobs, strict=True):
            assert one.logprob == pytest.approx(other.logprob, abs=1e-4)


def test_a_request_beside_asks_is_the_same_to_the_bit(engine: Any, loras: list[Lora]) -> None:
    """An ordinary request streams; between its tokens others run with an adapter."""
    request = GenerationRequest(
        "plain", PROMPTS[0], SamplingParams(max_tokens=12, temperature=0, logprobs=5)
    )

    async def told(beside: bool) -> list[tuple[Any, ...]]:
        found = []
        async for event in engine.generate(request):
            found.append((event.token, event.logprob))
            if beside and len(found) in (1, 4):
                lora = loras[len(found) % 2]
                await asyncio.to_thread(engine.complete, [asked(p, lora) for p in PROMPTS])
        return found

    async def amid() -> list[tuple[Any, ...]]:
        asks = [
            asyncio.to_thread(engine.complete, [asked(p, lora) for p in PROMPTS])
            for lora in (*loras, *loras)
        ]
        answer, *_ = await asyncio.gather(told(beside=False), *asks)
        return answer

    alone = asyncio.run(told(beside=False))
    assert asyncio.run(told(beside=True)) == alone
    assert asyncio.run(amid()) == alone
    states = engine._hooked.model.state_dict()
    fresh = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32).state_dict()
    assert all(torch.equal(states[name], weight) for name, weight in fresh.items())


def test_a_steered_request_with_an_adapter_has_its_receipt(engine: Any, loras: list[Lora]) -> None:
    from artefacts import random_vector

    from steer.artefacts.library import MemoryLibrary
    from steer.engines.plans import plans_of
    from steer.spec import parse_spec

    vector = random_vector(1, 2, width=192)
    plan = plans_of(engine, MemoryLibrary(vectors={"v": vector})).plan(
        parse_spec({"interventions": [{"kind": "add", "vector": "v", "strength": {"norm": 1}}]})
    )
    request = GenerationRequest("x", PROMPTS[1], SAMPLING, plan, lora=loras[0])
    steered, plain = engine.complete([request, asked(PROMPTS[1], loras[0])])
    assert steered.receipt.tokens_steered == len(PROMPTS[1]) + 5
    assert steered.tokens != plain.tokens
    assert engine.stats().slots_in_use == 0


def test_what_runs_no_adapters_says_so(engine: Any, loras: list[Lora]) -> None:
    from dataclasses import replace

    able = replace(engine.capabilities, lora=False)
    for name, advice in (("fake", "another engine"), ("vllm", "--enable-lora")):
        with pytest.raises(Unsupported, match=advice) as caught:
            check_lora(asked(PROMPTS[0], loras[0]), replace(able, engine=name))
        assert caught.value.code == "no_lora"
    wrong = random_lora(0, {"model.layers.0.self_attn.q_proj": (8, 8)})
    with pytest.raises(Exception, match="another size"):
        engine.complete([asked(PROMPTS[0], wrong)])

    async def streamed() -> None:
        async for _ in engine.generate(asked(PROMPTS[0], loras[0])):
            pass

    with pytest.raises(Unsupported, match="as a whole"):
        asyncio.run(streamed())
