"""Asking states on vLLM, whose own LoRA serves the oracle: the same answers as on the transformers
engine, and nothing of the adapter in what is read or said beside."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import vllm_engine
from artefacts import random_oracle

from steer.artefacts.library import MemoryLibrary
from steer.artefacts.oracle_form import FORMS
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import SteerError
from steer.inspection import AskRequest, ask

MODULES = {
    f"model.layers.{layer}.{name}": sizes
    for layer in range(6)
    for name, sizes in (("self_attn.q_proj", (192, 192)), ("mlp.down_proj", (512, 192)))
}
LIBRARY = MemoryLibrary(
    oracles={
        "one": random_oracle(1, MODULES, 6, width=192),
        "two": random_oracle(2, MODULES, 6, width=192, form=FORMS["latent_qa"]),
        "wide": random_oracle(3, {"model.layers.0.mlp.down_proj": (512, 192)}, 6, width=192),
    }
)
ASKED: dict[str, dict[str, Any]] = {
    "an oracle": {"oracle": "one", "positions": [-2, -1]},
    "one that replaces": {"oracle": "two"},
    "the model as it is": {},
    "states of a steered model": {
        "oracle": "one",
        "source": {
            "text": "The capital of France is",
            "steering": {
                "interventions": [
                    {"kind": "ablate", "vector": "v1", "layers": [1], "strength": 0.5}
                ]
            },
        },
    },
}


@pytest.fixture(scope="module")
def engine(registry: Path) -> Iterator[VllmEngine]:
    options = {"enable_lora": True, "max_loras": 3, "max_lora_rank": 8}
    with vllm_engine.start_engine(registry, **options) as running:
        yield running


def answers(engine: Engine, registry: Path, fields: dict[str, Any]) -> Any:
    from steer.engines.plans import plans_of
    from steer.registry.registry import Registry

    body = {
        "source": {"text": "The capital of France is"},
        "questions": ["Which language comes next?", "What is it about?"],
        "layers": [1, 3, 5],
        "max_tokens": 5,
        **fields,
    }
    with Registry.open(registry) as opened:
        plans = plans_of(engine, opened)
        return ask(engine, AskRequest.model_validate(body), plans=plans, library=LIBRARY)


@pytest.mark.parametrize("name", ASKED)
def test_both_engines_answer_alike(
    engine: VllmEngine, reference: TransformersEngine, registry: Path, name: str
) -> None:
    mine, other = (answers(one, registry, ASKED[name]) for one in (engine, reference))
    assert (mine.layers, mine.trained, mine.form) == (other.layers, other.trained, other.form)
    for here, there in zip(mine.cells, other.cells, strict=True):
        pairs = [(here, there)]
        pairs += [(getattr(here.controls, c), getattr(there.controls, c)) for c in ("text", "none")]
        pairs += [(here.controls.shuffled, there.controls.shuffled)]
        for one, two in pairs:
            assert one.text == two.text
            assert one.probability == pytest.approx(two.probability, abs=1e-3)


def test_what_runs_after_an_oracle_is_the_models_own(
    engine: VllmEngine, reference: TransformersEngine, registry: Path
) -> None:
    """The same long prompt without and with adapters, in turn: each has a cache of its own."""
    prompt = tuple(range(100, 180))
    sampling = SamplingParams(max_tokens=5, temperature=0, logprobs=0, ignore_eos=True)
    loras = [None, LIBRARY.oracle("one").lora, None, LIBRARY.oracle("two").lora, None]
    requests = [
        GenerationRequest(str(n), prompt, sampling, lora=lora) for n, lora in enumerate(loras)
    ]
    wanted = reference.complete(requests)
    for mine in (engine.complete(requests), [engine.complete([one])[0] for one in requests]):
        for one, two in zip(mine, wanted, strict=True):
            assert one.tokens == two.tokens
            theirs = [each.logprob for each in two.logprobs]
            assert [each.logprob for each in one.logprobs] == pytest.approx(theirs, abs=1e-3)


def test_an_adapter_that_does_not_fit_is_refused(engine: VllmEngine, registry: Path) -> None:
    assert engine.capabilities.lora
    big = random_oracle(4, {"model.layers.0.mlp.down_proj": (512, 192)}, 6, width=192)
    wide = type(big.lora).of(
        {
            name: part._replace(down=part.down.repeat(4, 1), up=part.up.repeat(1, 4))
            for name, part in big.lora.parts.items()
        }
    )
    with pytest.raises(SteerError, match="rank 16") as caught:
        engine.complete([GenerationRequest("x", (5, 9), lora=wide)])
    assert caught.value.code == "no_lora"
