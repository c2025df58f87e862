"""Specs of many kinds on SmolLM2's width, over planted artefacts, for what runs the real model."""

from __future__ import annotations

import torch

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.sae.base import SAE
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.plans import plans_of
from steer.plan.plan import SteeringPlan
from steer.prompts import chat_tokens
from steer.spec import parse_spec

WIDTH, LAYERS, SAE_LAYER, VALUE = 576, (12, 14, 16), 14, 30.0
QUESTIONS = (
    "What is the capital of France?",
    "Name three colours.",
    "How do I boil an egg?",
    "What is 12 times 12?",
    "Write a short sentence about the sea.",
    "Who wrote Romeo and Juliet?",
)


def _direction(seed: int) -> torch.Tensor:
    row = torch.randn(WIDTH, generator=torch.Generator().manual_seed(seed))
    return row / row.norm()


def planted_sae() -> SAE:
    """Four features along random directions, which read what they write."""
    rows = torch.stack([_direction(seed) for seed in range(20, 24)])
    return SAE.of(
        "standard",
        W_enc=rows.T.contiguous(),
        b_enc=torch.zeros(4),
        W_dec=rows,
        b_dec=torch.zeros(WIDTH),
        layer=SAE_LAYER,
    )


LIBRARY = MemoryLibrary(
    vectors={
        "one": ControlVector.of({layer: 8 * _direction(layer) for layer in LAYERS}),
        "other": ControlVector.of({layer: _direction(40 + layer) for layer in LAYERS}),
    },
    saes={"planted": planted_sae()},
)

SPECS: dict[str, dict[str, object]] = {
    "add": {"interventions": [{"kind": "add", "vector": "one", "strength": 2}]},
    "add a share of the norm": {
        "interventions": [{"kind": "add", "vector": "other", "strength": {"norm": 0.2}}],
        "norm": "preserve",
    },
    "ablate": {"interventions": [{"kind": "ablate", "vector": "other"}]},
    "clamp": {
        "interventions": [
            {"kind": "clamp", "sae": "planted", "features": [1], "value": VALUE, "mode": "set"}
        ]
    },
    "add to the answer": {
        "interventions": [
            {"kind": "add", "vector": "one", "strength": 3, "where": {"phases": ["generation"]}}
        ]
    },
}


def compiled(engine: Engine) -> dict[str, SteeringPlan | None]:
    """The plans of `SPECS` on an engine, and none at all."""
    plans = plans_of(engine, LIBRARY)
    return {"unsteered": None} | {
        name: plans.plan(parse_spec(spec)) for name, spec in SPECS.items()
    }


def chat(engine: Engine, text: str) -> tuple[int, ...]:
    """The tokens of a chat with one message, up to where the model answers."""
    return tuple(chat_tokens(engine.tokenizer, [{"role": "user", "content": text}]))


def requests_for(
    engine: Engine, plans: dict[str, SteeringPlan | None], tokens: int = 12
) -> list[GenerationRequest]:
    """A greedy answer to each question, each under another spec."""
    sampling = SamplingParams(max_tokens=tokens, temperature=0, logprobs=2)
    return [
        GenerationRequest(name, chat(engine, question), sampling, plan)
        for question, (name, plan) in zip(QUESTIONS, plans.items(), strict=True)
    ]
