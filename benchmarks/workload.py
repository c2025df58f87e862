"""The work: 64 chats of the demo model, 32 tokens each, over any number of distinct specs."""

from __future__ import annotations

import json
from collections.abc import Sequence

from steer_vectors import LIBRARY

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import Library, MemoryLibrary
from steer.engines.base import GenerationRequest, SamplingParams
from steer.engines.transformers.engine import TransformersEngine
from steer.plan.cache import PlanCache
from steer.prompts import chat_tokens
from steer.spec import parse_spec

CHATS, TOKENS = 64, 32
MODEL = LIBRARY / "demo" / "model"
NAMES = ("french", "german", "formal", "casual")


def vectors() -> dict[str, ControlVector]:
    """The demo's fitted vectors."""
    folder = LIBRARY / "demo" / "vectors"
    return {
        name: ControlVector.from_bytes((folder / f"{name}.safetensors").read_bytes(), name=name)
        for name in NAMES
    }


def prompts(engine: TransformersEngine) -> list[tuple[int, ...]]:
    """64 held-out chats as token ids."""
    lines = (LIBRARY / "demo" / "data" / "heldout.jsonl").read_text().splitlines()
    chats = [json.loads(line)["messages"] for line in lines]
    chosen = chats[:: max(1, len(chats) // CHATS)][:CHATS]
    return [tuple(chat_tokens(engine.tokenizer, chat)) for chat in chosen]


def specs(count: int) -> list[dict[str, object]]:
    """`count` distinct specs: the demo's vectors at different strengths, on every token."""
    return [
        {
            "interventions": [
                {
                    "kind": "add",
                    "vector": NAMES[n % len(NAMES)],
                    "strength": round(0.2 + 0.01 * n, 3),
                    "where": {"phases": ["prompt", "generation"]},
                }
            ]
        }
        for n in range(count)
    ]


def mixed_specs(count: int) -> list[dict[str, object]]:
    """`count` distinct specs that read the stream: ablate, project, rotate, norm-preserving add."""
    found: list[dict[str, object]] = []
    for n in range(count):
        vector, other = NAMES[n % 4], NAMES[(n + 1) % 4]
        strength = round(0.2 + 0.01 * n, 3)
        kinds = [
            {"kind": "ablate", "vector": vector, "strength": strength},
            {"kind": "project", "vector": vector, "value": strength, "mode": "at_least"},
            {"kind": "rotate", "vector": vector, "toward": other, "degrees": 10.0 + n},
            {"kind": "add", "vector": vector, "strength": {"norm": strength / 4}},
        ]
        found.append(
            {"interventions": [kinds[n % 4]], "where": {"phases": ["prompt", "generation"]}}
        )
    return found


def requests(
    engine: TransformersEngine,
    chosen: Sequence[dict[str, object]],
    library: Library | None = None,
) -> list[GenerationRequest]:
    """64 requests over the specs in turn; unsteered where there are none."""
    plans = PlanCache(library or MemoryLibrary(vectors()), engine.info, engine.capabilities)
    compiled = [plans.plan(parse_spec(spec)) for spec in chosen]
    sampling = SamplingParams(max_tokens=TOKENS, temperature=0, ignore_eos=True)
    return [
        GenerationRequest(
            str(n), prompt, sampling, compiled[n % len(compiled)] if compiled else None
        )
        for n, prompt in enumerate(prompts(engine))
    ]
