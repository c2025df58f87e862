"""Choosing tokens: one maximum for all rows, transformers' warpers for those that are drawn."""

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

GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in vLLM: logits divided by them leave float32."""

NO_TOKEN = -1
"""In the place of a token where logits name none."""

LEAST_LOGPROB = -9999.0
"""Reported for tokens that a model never says, as by OpenAI and vLLM: JSON has no −inf."""


class Sampler:
    """The random state and the logits processors of one request.

    Guarantees: with a seed, the tokens depend on the request alone, not on its neighbours.
    """

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.params = params
        self.greedy = params.temperature < GREEDY_BELOW
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._processors = LogitsProcessorList()
        if not self.greedy:
            if params.temperature != 1:
                self._processors.append(TemperatureLogitsWarper(float(params.temperature)))
            if params.top_k is not None:
                self._processors.append(TopKLogitsWarper(params.top_k))
            if params.top_p < 1:
                self._processors.append(TopPLogitsWarper(float(params.top_p)))

    def draw(self, logits: Tensor) -> int:
        """A token from one row of logits `[vocab]`; `NO_TOKEN` where the processors leave what no
        token can be drawn from."""
        no_history = torch.zeros(1, 0, dtype=torch.long, device=logits.device)
        scores = self._processors(
            cast(torch.LongTensor, no_history), cast(torch.FloatTensor, logits[None])
        )
        chances = scores.softmax(-1)
        # On a GPU a draw from NaN ends the process. Marked there, so that the host waits once.
        sound = chances.isfinite().all()
        token = torch.multinomial(torch.where(sound, chances, 1.0), 1, generator=self._generator)
        return int(torch.where(sound, token, NO_TOKEN))


def choose(logits: Tensor, samplers: Sequence[Sampler]) -> list[int | Exception]:
    """A token for each row of float32 logits `[n, vocab]`.

    `NO_TOKEN` stands where the likeliest has no finite logit (a model may give −inf to tokens that
    it never says, so that the largest alone counts); an exception where drawing failed.
    """
    largest, likeliest = logits.max(-1)
    best: list[int] = likeliest.masked_fill(~largest.isfinite(), NO_TOKEN).tolist()
    chosen: list[int | Exception] = list(best)
    for row, sampler in enumerate(samplers):
        if not sampler.greedy and best[row] != NO_TOKEN:
            try:
                chosen[row] = sampler.draw(logits[row])
            except Exception as error:
                chosen[row] = error
    return chosen


def logprobs(
    logits: Tensor, tokens: Sequence[int], samplers: Sequence[Sampler]
) -> list[TokenLogprob | None]:
    """Log-probabilities of `tokens` under the model's own distribution, for the rows that ask for
    them."""
    asking = [row for row, s in enumerate(samplers) if s.params.logprobs is not None]
    found: list[TokenLogprob | None] = [None] * len(tokens)
    if not asking:
        return found
    table = logits[asking].log_softmax(-1).clamp_min_(LEAST_LOGPROB)
    for place, row in enumerate(asking):
        count = samplers[row].params.logprobs or 0
        top: tuple[tuple[int, float], ...] = ()
        if count:
            values, ids = table[place].topk(count)
            top = tuple(zip(ids.tolist(), values.tolist(), strict=True))
        found[row] = TokenLogprob(float(table[place, tokens[row]]), top)
    return found
