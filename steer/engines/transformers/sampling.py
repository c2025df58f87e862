"""Choosing tokens: one maximum for all greedy rows, transformers' processors for the others.

The order is vLLM's: bias and the ban of end tokens, penalties, temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from steer.engines.base import SamplingParams, TokenLogprob
from steer.engines.logprobs import log_probabilities, token_logprob


class GeneratedTokenPenalty(LogitsProcessor):
    """OpenAI's presence and frequency penalties, which count what was generated alone;
    transformers has no such processor."""

    def __init__(self, presence: float, frequency: float, *, prompt_length: int) -> None:
        self._presence, self._frequency = presence, frequency
        self._prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        generated = input_ids[:, self._prompt_length :]
        counts = torch.zeros_like(scores)
        counts.scatter_add_(1, generated, torch.ones_like(generated, dtype=scores.dtype))
        return scores - self._frequency * counts - self._presence * (counts > 0)


GREEDY_BELOW = 1e-5
"""Lower temperatures are greedy, as in vLLM: logits divided by them leave float32."""

NO_TOKEN = -1
"""In the place of a token where logits name none."""

LEAST_LOGPROB = -9999.0
"""Reported for tokens that a model never says, as by OpenAI and vLLM: JSON has no −inf."""


class Sampler:
    """The random state and the logits processors of one request.

    `ends` are the tokens that end its sequence. Guarantees: with a seed, the tokens depend on the
    request alone, not on its neighbours.
    """

    def __init__(
        self,
        params: SamplingParams,
        device: torch.device,
        *,
        prompt: Sequence[int] = (),
        ends: Collection[int] = (),
        grammar: LogitsProcessor | None = None,
    ) -> None:
        self.params = params
        self.greedy = params.temperature < GREEDY_BELOW
        self._generator = torch.Generator(device)
        if params.seed is None:
            self._generator.seed()
        else:
            self._generator.manual_seed(params.seed)
        self._prompt = tuple(prompt)
        self._changes = _changes(params, len(self._prompt), ends, device)
        if grammar is not None:
            # In front: nothing added to a logit makes a token possible again.
            self._changes.insert(0, grammar)
        self._cuts = LogitsProcessorList() if self.greedy else _cuts(params)

    @property
    def plain(self) -> bool:
        """Whether its tokens are the largest logits, so that they are chosen with the others."""
        return self.greedy and not self._changes

    def draw(self, logits: Tensor, generated: Sequence[int]) -> int:
        """A token from one row of logits `[vocab]`, after the tokens `generated` so far; `NO_TOKEN`
        where the processors leave what no token can be chosen from."""
        seen = [*self._prompt, *generated] if self._changes else []
        history = torch.tensor([seen], dtype=torch.long, device=logits.device)
        scores = logits[None]
        for processors in (self._changes, self._cuts):
            scores = processors(cast(torch.LongTensor, history), cast(torch.FloatTensor, scores))
        if self.greedy:
            largest, likeliest = scores[0].max(-1)
            return int(torch.where(largest.isfinite(), likeliest, NO_TOKEN))
        chances = scores.softmax(-1)
        # On a GPU a draw from NaN ends the process. Marked there, so that the host waits once.
        sound = chances.isfinite().all()
        token = torch.multinomial(torch.where(sound, chances, 1.0), 1, generator=self._generator)
        return int(torch.where(sound, token, NO_TOKEN))


def _changes(
    params: SamplingParams, prompt_length: int, ends: Collection[int], device: torch.device
) -> LogitsProcessorList:
    """What may change which token is the most likely; it reads prompt and generated tokens."""
    made = LogitsProcessorList()
    if params.logit_bias:
        biases: list[list[list[int] | float]] = [
            [[token], float(bias)] for token, bias in params.logit_bias
        ]
        made.append(SequenceBiasLogitsProcessor(biases))
    if params.min_tokens and ends:
        made.append(
            MinNewTokensLengthLogitsProcessor(
                prompt_length, params.min_tokens, sorted(ends), device=str(device)
            )
        )
    if params.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(float(params.repetition_penalty)))
    if params.presence_penalty or params.frequency_penalty:
        made.append(
            GeneratedTokenPenalty(
                params.presence_penalty, params.frequency_penalty, prompt_length=prompt_length
            )
        )
    return made


def _cuts(params: SamplingParams) -> LogitsProcessorList:
    """Temperature, and which tokens are too unlikely to be drawn."""
    made = LogitsProcessorList()
    if params.temperature != 1:
        made.append(TemperatureLogitsWarper(float(params.temperature)))
    if params.min_p:
        made.append(MinPLogitsWarper(float(params.min_p)))
    if params.top_k is not None:
        made.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        made.append(TopPLogitsWarper(float(params.top_p)))
    return made


def choose(
    logits: Tensor, samplers: Sequence[Sampler], generated: Sequence[Sequence[int]]
) -> list[int | Exception]:
    """A token for each row of float32 logits `[n, vocab]`, after those `generated` in each row.

    `NO_TOKEN` stands where the likeliest has no finite logit (a model may give −inf to tokens that
    it never says, so that the largest alone counts); an exception where drawing failed.
    """
    largest, likeliest = logits.max(-1)
    best: list[int] = likeliest.masked_fill(~largest.isfinite(), NO_TOKEN).tolist()
    chosen: list[int | Exception] = list(best)
    for row, sampler in enumerate(samplers):
        if not sampler.plain and best[row] != NO_TOKEN:
            try:
                chosen[row] = sampler.draw(logits[row], generated[row])
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
    table = log_probabilities(logits[asking])
    for place, row in enumerate(asking):
        found[row] = token_logprob(table[place], tokens[row], samplers[row].params.logprobs or 0)
    return found
