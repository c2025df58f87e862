"""Prompts through the model: left-padded, in column chunks, with edits and captures."""

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
from steer.engines.transformers.hooks import HookedModel
from steer.model import HookPoint


@dataclass(frozen=True)
class PromptPass:
    """What a pass over n prompts left behind.

    `cache` and `mask` `[n, columns]` are right-aligned; `logits` `[n, 1 or columns, vocab]` are
    None unless asked for; `states` hold `[n, columns, width]` per hook point, padding included.
    """

    cache: DynamicCache
    mask: Tensor
    logits: Tensor | None
    states: dict[HookPoint, Tensor]


def run_prompts(
    hooked: HookedModel,
    tables: Tables,
    ledger: Ledger,
    requests: Sequence[SteeredRequest],
    prompts: Sequence[Sequence[int]],
    *,
    points: tuple[HookPoint, ...] = (),
    logits: Literal["none", "last", "all"] = "last",
    chunk: int = 512,
) -> PromptPass:
    """Computes all prompts, each row with its own request's steering."""
    width = max(map(len, prompts))
    ids = np.zeros((len(prompts), width), dtype=np.int64)
    mask = np.zeros((len(prompts), width), dtype=np.int64)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    places = np.maximum(mask.cumsum(1) - 1, 0)
    device = hooked.device
    all_mask = torch.from_numpy(mask).to(device)
    cache = DynamicCache()
    kept_states: list[dict[HookPoint, Tensor]] = []
    kept_logits: list[Tensor] = []
    for start in range(0, width, chunk):
        end = min(start + chunk, width)
        step = _step(tables, ledger, requests, prompts, width, start, end)
        last = end == width
        wanted = end - start if logits == "all" else 1
        outputs, states = hooked.forward(
            step,
            points,
            input_ids=torch.from_numpy(ids[:, start:end]).to(device),
            attention_mask=all_mask[:, :end],
            position_ids=torch.from_numpy(places[:, start:end]).to(device),
            key_values=cache,
            use_cache=True,
            logits_to_keep=wanted,
        )
        kept_states.append(states)
        if logits == "all" or (last and logits == "last"):
            kept_logits.append(outputs.logits.float())
    return PromptPass(
        cache,
        all_mask,
        torch.cat(kept_logits, 1) if kept_logits else None,
        {p: torch.cat([part[p] for part in kept_states], 1) for p in points},
    )


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
