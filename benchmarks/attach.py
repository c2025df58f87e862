"""`steer.attach` in a notebook, against a bare `register_forward_hook` that adds the same row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

import steer
from benchmarks.timing import interleaved, paired_ratio
from benchmarks.workload import CHATS, MODEL, TOKENS, vectors

LAYER = 4


def run(rounds: int) -> list[tuple[str, str, str, str]]:
    """`generate` of one chat and of a batch, steered at one layer on every token."""
    from transformers import AutoModelForCausalLM  # noqa: PLC0415

    model: Any = AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")
    vector = vectors()["french"]
    row = 0.5 * vector[LAYER]
    spec = {
        "interventions": [{"kind": "add", "vector": "french", "layers": [LAYER], "strength": 0.5}],
        "where": {"phases": ["prompt", "generation"]},
    }
    rows = []
    for batch in (1, CHATS):
        ids = torch.arange(3, 19).repeat(batch, 1)

        def generate(ids: torch.Tensor = ids) -> float:
            out = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=TOKENS,
                min_new_tokens=TOKENS,
                do_sample=False,
                pad_token_id=0,
            )
            return float(out[:, ids.shape[1] :].numel())

        def bare(generate: Callable[[], float] = generate) -> float:
            hook = model.model.layers[LAYER].register_forward_hook(lambda _m, _a, out: out + row)
            try:
                return generate()
            finally:
                hook.remove()

        def attached(generate: Callable[[], float] = generate) -> float:
            with steer.attach(model, spec, vectors={"french": vector}):
                return generate()

        with torch.inference_mode():
            found = interleaved(
                {"bare hook": bare, "attach": attached}, rounds=2 * rounds, title=f"attach {batch}"
            )
        cost = paired_ratio(found["bare hook"], found["attach"])
        rows.append((f"bare hook, batch {batch}", str(found["bare hook"]), "", ""))
        rows.append(
            (f"attach, batch {batch}", str(found["attach"]), f"{cost} × the time", "≤ 1.1 ×")
        )
    return rows
