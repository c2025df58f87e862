"""Choosing tokens: one maximum for all greedy rows and one draw for all others, after transformers'
processors where a row asks for them.

The order is vLLM's: bias and the ban of end tokens, penalties, temperature, min-p, top-k, top-p.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import cast

import torch
from torch import Tensor
from torch.nn.functional import pad
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
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


_STRETCH = 256
"""Words of the vocabulary that are laid end to end as one, when a token is drawn."""


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
        # On the host, wherever the logits are: one number of it is needed for a token.
        self._generator = torch.Generator()
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
        """Whether its tokens are the largest logits, as they come."""
        return self.greedy and not self._changes

    def scores(self, logits: Tensor, generated: Sequence[int]) -> Tensor:
        """One row of logits `[vocab]`, after the tokens `generated` so far, as the processors leave
        it: its largest is chosen where the request is greedy, else a token drawn from its softmax.
        """
        seen = [*self._prompt, *generated] if self._changes else []
        history = cast(torch.LongTensor, torch.tensor([seen], dtype=torch.long).to(logits.device))
        scores = self._changes(history, cast(torch.FloatTensor, logits[None]))
        if not self.greedy and self.params.temperature != 1:
            scores = cast(torch.FloatTensor, scores / self.params.temperature)
        return self._cuts(history, scores)[0]

    def point(self) -> float:
        """The next number of its random state, 0 ≤ u < 1."""
        return float(torch.rand((), generator=self._generator, dtype=torch.float64))


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
    """Which tokens are too unlikely to be drawn, at the temperature."""
    made = LogitsProcessorList()
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
    chosen: list[int | Exception] = list(_likeliest(logits))
    asking = [row for row, one in enumerate(samplers) if not one.plain and chosen[row] != NO_TOKEN]
    scores: dict[int, Tensor] = {}
    for row in asking:
        try:
            scores[row] = samplers[row].scores(logits[row], generated[row])
        except Exception as error:
            chosen[row] = error
    for greedy in (True, False):
        rows = [row for row in scores if samplers[row].greedy is greedy]
        if rows:
            table = torch.stack([scores[row] for row in rows])
            points = [] if greedy else [samplers[row].point() for row in rows]
            tokens = _likeliest(table) if greedy else drawn(table, points)
            for row, token in zip(rows, tokens, strict=True):
                chosen[row] = token
    return chosen


def _likeliest(scores: Tensor) -> list[int]:
    """The largest of each row; `NO_TOKEN` where that is not finite."""
    largest, likeliest = scores.max(-1)
    tokens: list[int] = likeliest.masked_fill(~largest.isfinite(), NO_TOKEN).tolist()
    return tokens


def drawn(scores: Tensor, points: Sequence[float]) -> list[int]:
    """Of each row of `scores` `[n, vocab]` the token in whose share of the softmax, the shares laid
    end to end, the row's point falls (0 ≤ point < 1); `NO_TOKEN` where a row has no softmax.

    A row's token depends on nothing but the row and its point. One number is drawn for a token,
    where `torch.multinomial` draws one for each word of the vocabulary.
    """
    shares = scores.softmax(-1)
    # First the stretch of words is found, then the word in it: a running sum goes one by one, and
    # over the whole vocabulary it takes longer than the model's last matrix.
    shares = pad(shares, (0, -shares.shape[-1] % _STRETCH))
    stretches = shares.view(len(points), -1, _STRETCH)
    sums = stretches.sum(-1).double()
    total = sums.sum(-1)
    places = total * torch.tensor(points, dtype=torch.float64).to(total.device)
    stretch, before = _reached(sums, places)
    inside = stretches[torch.arange(len(points), device=total.device), stretch].double()
    word, _ = _reached(inside, places - before)
    found = torch.where(total.isfinite(), stretch * _STRETCH + word, NO_TOKEN)
    tokens: list[int] = found.tolist()
    return tokens


def _reached(shares: Tensor, places: Tensor) -> tuple[Tensor, Tensor]:
    """In each row of `shares` `[n, m]`, laid end to end, the one in which the row's place lies, and
    the sum of those before it; where rounding puts it outside, the nearest that is above 0."""
    ends = shares.cumsum(-1)
    # Below the end even after rounding: at it, one without a share would be found.
    below = torch.nextafter(ends[:, -1], torch.zeros_like(places))
    inside = torch.minimum(places.clamp_min(0), below)
    found = torch.searchsorted(ends, inside[:, None], right=True).clamp_max(shares.shape[-1] - 1)
    return found[:, 0], (ends - shares).gather(-1, found)[:, 0]


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
