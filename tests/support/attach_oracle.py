"""What `attach` should do, by a hook by hand and without caches, chunks, masks and wrappers.

One row alone, all of it fed again for every token, and the vector added at the positions that the
spec means.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from artefacts import random_vector
from tiny_models import LAYERS, WIDTH
from torch import nn
from transformers import DynamicCache

import steer

VECTOR = random_vector(0, *range(LAYERS), width=WIDTH)
LAYER, STRENGTH, NEW, LENGTH = 1, 1.5, 8, 12
IDS = torch.arange(3, 3 + LENGTH)[None]
ADD = {"kind": "add", "vector": "v", "layers": [LAYER], "strength": STRENGTH}

Selects = Callable[[int, int], bool]
WHERE: dict[str, tuple[dict[str, Any] | None, Selects]] = {
    "everything": (None, lambda position, prompt: True),
    "prompt": ({"phases": ["prompt"]}, lambda position, prompt: position < prompt),
    "generation": ({"phases": ["generation"]}, lambda position, prompt: position >= prompt),
    "first": ({"positions": [[0, 1]]}, lambda position, prompt: position == 0),
    "window": ({"positions": [[-2, 15]]}, lambda position, prompt: prompt - 2 <= position < 15),
}


def steered(model: Any, where: str = "everything") -> Any:
    spec: dict[str, Any] = {"interventions": [ADD], "where": WHERE[where][0]}
    return steer.attach(model, spec, vectors={"v": VECTOR})


@contextmanager
def by_hand(model: Any, chosen: list[bool]) -> Iterator[None]:
    """The vector added where `chosen`, by a hook."""

    def hook(module: nn.Module, args: Any, output: Any) -> Any:
        states = output if isinstance(output, torch.Tensor) else output[0]
        added = states + torch.tensor(chosen)[:, None] * (STRENGTH * VECTOR[LAYER])
        return added if isinstance(output, torch.Tensor) else (added, *output[1:])

    layers = model.transformer.h if hasattr(model, "transformer") else model.model.layers
    handle = layers[LAYER].register_forward_hook(hook)
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        handle.remove()


def oracle(
    model: Any, prompt: list[int], where: str, *, new: int = NEW, known: int = 0
) -> tuple[list[int], int]:
    """Greedy tokens, and how many were steered, the first `known` being in a ready cache."""
    tokens, selects = list(prompt), WHERE[where][1]
    chosen: list[bool] = []
    with by_hand(model, chosen), torch.no_grad():
        for _ in range(new):
            chosen[:] = [n >= known and selects(n, len(prompt)) for n in range(len(tokens))]
            logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits
            tokens.append(int(logits[0, -1].argmax()))
    return tokens[len(prompt) :], sum(chosen)


def score(model: Any, prompt: list[int], generated: list[int], where: str) -> float:
    """Mean log-probability of what was generated, the whole fed at once."""
    tokens = prompt + generated
    chosen = [WHERE[where][1](n, len(prompt)) for n in range(len(tokens))]
    with by_hand(model, chosen), torch.no_grad():
        logits = model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0]
    places = torch.arange(len(prompt) - 1, len(tokens) - 1)
    return float(logits.log_softmax(-1)[places, torch.tensor(generated)].mean())


def generate(model: Any, ids: torch.Tensor = IDS, **more: Any) -> list[list[int]]:
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False} | more
    out = model.generate(input_ids=ids, pad_token_id=0, eos_token_id=None, **options)
    found: list[list[int]] = out[:, ids.shape[1] :].tolist()
    return found


def begun(model: Any, length: int = 6) -> Any:
    """A cache of the first tokens, unsteered."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=IDS[:, :length], past_key_values=cache)
    return cache
