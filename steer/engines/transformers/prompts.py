"""Prompts through the model, with edits and captures: padded and in column chunks, or one whole."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from transformers import DynamicCache

from steer.batch.ledger import Ledger
from steer.batch.requests import Span, SteeredRequest
from steer.batch.step import Step, build_step
from steer.batch.tables import Tables
from steer.engines.base import TokenLogprob
from steer.engines.logprobs import following
from steer.engines.transformers.hooks import HookedModel
from steer.model import HookPoint
from steer.readouts.readers import Instruments
from steer.readouts.readings import Readings, ReadSpan, RequestReadouts

MOST_LOGITS = 1024
"""Rows of logits that are held at a time where all of a prompt are read: a large vocabulary makes
half a gigabyte of them."""


@dataclass(frozen=True)
class PromptPass:
    """What a pass over n prompts left behind.

    `cache` and `mask` `[n, columns]` are right-aligned; `logits` `[n, 1 or columns, vocab]` are
    None unless asked for; `states` hold `[n, columns, width]` per hook point, padding included;
    `logprobs` those of each prompt's tokens but the first.
    """

    cache: DynamicCache | None
    mask: Tensor
    logits: Tensor | None
    states: dict[HookPoint, Tensor]
    logprobs: list[list[TokenLogprob]]


@dataclass(frozen=True)
class Read:
    """What is read of each of several prompts, and with what."""

    requests: Sequence[RequestReadouts | None]
    tools: Instruments

    @staticmethod
    def of(requests: Sequence[RequestReadouts | None], tools: Instruments) -> Read | None:
        """None where nothing is asked for."""
        return Read(requests, tools) if any(one is not None for one in requests) else None

    def readings(
        self, prompts: Sequence[Sequence[int]], width: int, start: int, end: int
    ) -> Readings | None:
        """What columns `start` to `end` of the padded batch give."""
        spans = []
        for row, (request, prompt) in enumerate(zip(self.requests, prompts, strict=True)):
            padding = width - len(prompt)
            first = max(start, padding)
            if request is not None and first < end:
                offset = row * (end - start) + first - start
                spans.append(ReadSpan(request, offset, first - padding, end - first))
        return Readings.of(spans, self.tools)


def run_prompts(
    hooked: HookedModel,
    tables: Tables,
    ledger: Ledger,
    requests: Sequence[SteeredRequest],
    prompts: Sequence[Sequence[int]],
    *,
    points: tuple[HookPoint, ...] = (),
    logits: Literal["none", "last", "all"] = "last",
    logprobs: int | None = None,
    chunk: int | None = 512,
    shared: int = 0,
    alike: int = 0,
    tail: int | None = None,
    read: Read | None = None,
) -> PromptPass:
    """Computes all prompts, each row with its own request's steering.

    `chunk` is the number of columns of a pass. With None there is one pass, without a cache: for
    models that padding or a parted prompt would change, with prompts of one length. `logprobs` asks
    for the log-probabilities of the prompts' tokens with that many alternatives; the logits behind
    them are given up chunk by chunk.

    With a `tail`, only the logits at the last `tail` + 1 positions of each row are computed and
    kept, and only the tokens that they predict have log-probabilities.

    `read` says what is read of each prompt's tokens.

    The first `shared` tokens are computed once for all rows, and nothing of them is kept.
    Assumes: there every prompt is the same and none is steered; `chunk` is not None, and all
    prompts are of one length.

    Where one pass is enough, the first `alike` blocks are computed for one row.
    Assumes: there every prompt is the same, none is steered and nothing is read; the cache that
    is left behind is of no use to anybody.
    """
    if logprobs is not None and chunk is not None:
        chunk = min(chunk, max(1, MOST_LOGITS // len(prompts)))
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    places = np.maximum(mask.cumsum(1) - 1, 0)
    device = hooked.device
    all_mask = torch.from_numpy(mask).to(device)
    cache = None if chunk is None else DynamicCache()
    kept_states: list[dict[HookPoint, Tensor]] = []
    kept_logits: list[Tensor] = []
    scores: list[list[TokenLogprob]] = [[] for _ in prompts]
    if shared:
        hooked.forward(
            None,
            input_ids=torch.from_numpy(ids[:1, :shared]).to(device),
            attention_mask=all_mask[:1, :shared],
            position_ids=torch.from_numpy(places[:1, :shared]).to(device),
            key_values=cache,
            use_cache=True,
            logits_to_keep=last_columns(1, shared, device),
        )
        assert cache is not None
        cache.batch_repeat_interleave(len(prompts))
    starts = range(shared, width, chunk or width)
    given = None
    if alike and len(starts) == 1:
        given = hooked.stem(alike, *(torch.from_numpy(one[:1]).to(device) for one in (ids, places)))
    for start in starts:
        end = min(start + (chunk or width), width)
        step = _step(tables, ledger, requests, prompts, width, start, end)
        last = end == width
        # The first column of this pass whose logits are wanted.
        first = start if tail is None else max(start, min(width - tail - 1, end - 1))
        wanted = end - first if logits == "all" or logprobs is not None else 1
        readings = None if read is None else read.readings(prompts, width, start, end)
        rows = None if given is None else given[:, start:end].expand(len(prompts), -1, -1)
        with hooked.above(alike, rows):
            outputs, states = hooked.forward(
                step,
                points,
                readings=readings,
                input_ids=torch.from_numpy(ids[:, start:end]).to(device),
                attention_mask=all_mask[:, :end],
                position_ids=torch.from_numpy(places[:, start:end]).to(device),
                key_values=cache,
                use_cache=cache is not None,
                logits_to_keep=last_columns(wanted, end - start, device),
                states_alone=logits == "none" and logprobs is None,
            )
        if readings is not None:
            readings.finish()
        kept_states.append(states)
        if logprobs is not None:
            for row, prompt in enumerate(prompts):
                scores[row] += _scored(outputs.logits[row], prompt, (first, end), width, logprobs)
        if logits == "all" or (last and logits == "last"):
            kept_logits.append(outputs.logits[:, 0 if logits == "all" else -1 :].float())
    return PromptPass(
        cache,
        all_mask,
        torch.cat(kept_logits, 1) if kept_logits else None,
        {p: torch.cat([part[p] for part in kept_states], 1) for p in points},
        scores,
    )


def _scored(
    logits: Tensor, prompt: Sequence[int], columns: tuple[int, int], width: int, count: int
) -> list[TokenLogprob]:
    """The log-probabilities of the tokens that follow `columns` of one prompt's row, where
    `logits` `[columns, vocab]` are that row's."""
    start, end = (column - (width - len(prompt)) for column in columns)
    first = max(start, 0)
    tokens = prompt[first + 1 : max(end + 1, 0)]
    return following(logits[first - start :].float(), tokens, count) if tokens else []


def last_columns(count: int, columns: int, device: torch.device) -> Tensor:
    """The last `count` of a pass's columns, for `logits_to_keep`.

    As indices: from a number some models (Gemma 4) compute later blocks for those columns alone.
    """
    return torch.arange(columns - count, columns, device=device)


def _step(
    tables: Tables,
    ledger: Ledger,
    requests: Sequence[SteeredRequest],
    prompts: Sequence[Sequence[int]],
    width: int,
    start: int,
    end: int,
) -> Step | None:
    """The step for columns `start` to `end` of the padded batch."""
    spans = []
    columns = end - start
    for row, (steered, prompt) in enumerate(zip(requests, prompts, strict=True)):
        padding = width - len(prompt)
        first = max(start, padding)
        if steered.plan is None or first >= end:
            continue
        positions = np.arange(first - padding, end - padding, dtype=np.int64)
        tokens = np.asarray(prompt[first - padding : end - padding], dtype=np.int64)
        spans.append(Span(steered, row * columns + first - start, positions, tokens))
    return build_step(tables, ledger, spans, len(prompts) * columns)
