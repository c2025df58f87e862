"""Choosing tokens: one argmax for all greedy rows, transformers' warpers for the others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steer.engines.base import SamplingParams, TokenLogprob


class Sampler:
    """The random state and the logits processors of one request.

    Guarantees: with a seed, the tokens depend on the request alone, not on its neighbours.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.params = params
        self.greedy = params.temperature == 0
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._processors = LogitsProcessorList()
        if not self.greedy:
            if params.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(params.temperature))
            if params.top_k is not None:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self._processors.append(TopPLogitsWarper(params.top_p))

    def draw(self, logits: Tensor) -> int:
        """A token from one row of logits `[vocab]`."""
        no_history = torch.zeros(1, 0, dtype=torch.long, device=logits.device)
        scores = self._processors(
            cast(torch.LongTensor, no_history), cast(torch.FloatTensor, logits[None])
        )
        return int(torch.multinomial(scores.softmax(-1), 1, generator=self._generator))


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """A token for each row of float32 logits `[n, vocab]`."""
    tokens: list[int] = logits.argmax(-1).tolist()
    for row, sampler in enumerate(samplers):
        if not sampler.greedy:
            tokens[row] = sampler.draw(logits[row])
    return tokens


def logprobs(
    logits: Tensor, tokens: Sequence[int], samplers: Sequence[Sampler]
) -> list[TokenLogprob | None]:
    """Log-probabilities under the model's own distribution, for the rows that ask for them."""
    asking = [row for row, s in enumerate(samplers) if s.params.logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(tokens)
    if not asking:
        return found
    table = logits[asking].log_softmax(-1)
    for place, row in enumerate(asking):
        count = samplers[row].params.logprobs or 0
        top: tuple[tuple[int, float], ...] = ()
        if count:
            values, ids = table[place].topk(count)
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found[row] = TokenLogprob(float(table[place, tokens[row]]), top)
    return found
