"""Prompts with an answer as rows of a training batch: what is fed, steered and predicted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, Edit
from steer.fit.states import check_length, prompt_tokens
from steer.model import HookPoint
from steer.plan.selection import resolve
from steer.prompts import Marked, Prompt, answer_end, part_tokens
from steer.spec import Where


@dataclass(frozen=True)
class AnswerRow:
    """One prompt and answer as tokens: those of the prompt, then those to be predicted."""

    tokens: tuple[int, ...]
    prompt: int

    @property
    def fed(self) -> tuple[int, ...]:
        """All but the last token, which is only predicted."""
        return self.tokens[:-1]

    @property
    def answer(self) -> tuple[int, ...]:
        return self.tokens[self.prompt :]

    def steered(self, where: Where | None) -> list[int]:
        """The fed positions that `where` selects, as it will when it serves."""
        fed = np.array(self.fed, dtype=np.int64)
        chosen = resolve(where).mask(np.arange(len(fed)), self.prompt, fed)
        return [int(place) for place in np.flatnonzero(chosen)]


def answer_row(engine: Engine, prompt: Prompt, answer: str, *, ends: bool = True) -> AnswerRow:
    """`answer` to `prompt`, with the token that ends it where it `ends`. Raises `SteerError`."""
    asked = prompt_tokens(engine, prompt)
    plain = prompt.prompt if isinstance(prompt, Marked) else prompt
    end = answer_end(engine.tokenizer, chat=not isinstance(plain, str)) if ends else None
    said = part_tokens(engine.tokenizer, answer)
    whole = [*asked, *said, *([] if end is None else [end])]
    check_length(engine, whole, prompt)
    return AnswerRow(tuple(whole), len(asked))


def log_probabilities(
    model: DifferentiableModel,
    rows: Sequence[AnswerRow],
    edits: Mapping[HookPoint, Callable[[Tensor], Tensor]],
    where: Where | None,
) -> list[Tensor]:
    """log p of each answer's tokens, `[tokens]` for each row, under `edits` where `where` says."""
    fed = [row.fed for row in rows]
    mask = torch.zeros(len(rows), max(map(len, fed)), 1, dtype=torch.bool)
    for n, row in enumerate(rows):
        mask[n, row.steered(where)] = True
    mask = mask.to(model.device)
    traced = model.run(fed, edits={p: _masked(edit, mask) for p, edit in edits.items()})
    found = []
    for n, row in enumerate(rows):
        logits = traced.logits[n, row.prompt - 1 : len(row.fed)]
        wanted = torch.tensor(row.answer, device=model.device)
        found.append(-functional.cross_entropy(logits, wanted, reduction="none"))
    return found


def _masked(edit: Callable[[Tensor], Tensor], mask: Tensor) -> Edit:
    return lambda x: torch.where(mask, edit(x).to(x.dtype), x)
