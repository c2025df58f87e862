"""What a step computes next of requests that run: a piece of a prompt, or a token."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from steer.engines.vllm.worker.prepared import BatchTokens


class Computed(Protocol):
    """A request whose first `computed` tokens have been computed."""

    name: str
    tokens: list[int]
    prompt_length: int
    computed: int


def drawn_pieces(
    draw: random.Random, running: Sequence[Computed]
) -> tuple[BatchTokens, list[int], list[int]]:
    """The pass that comes, its tokens, and how many are of each request."""
    counts = [
        min(draw.randint(1, 5) if one.computed < one.prompt_length else 1, left)
        for one in running
        if (left := len(one.tokens) - one.computed)
    ]
    parts = [
        one.tokens[one.computed : one.computed + n] for one, n in zip(running, counts, strict=True)
    ]
    tokens = [token for part in parts for token in part]
    batch = BatchTokens(
        [one.name for one in running],
        np.array([one.computed for one in running], dtype=np.int64),
        np.array(counts, dtype=np.int64),
        lambda: np.array(tokens, dtype=np.int64),
    )
    return batch, tokens, counts
