"""What it is to prefer one answer to another: losses on the log-probabilities of both.

`lm` is plain likelihood of the answer to prefer. `simpo` (2405.14734) compares both per token.
`reps` (2505.20809) weighs the preferred answer by how much less likely it is to the unsteered
model, so that steering has to bring about what prompting alone would not:

    −log σ( max(log p₀(l) − log p₀(w), 1)/|w| · log p(w) − log p(l)/|l| )
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional

from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.fit.data.answering import completed
from steer.fit.data.instruction import Placement
from steer.fit.data.preferences import Preference, PreferenceSet, Side, sides_needed
from steer.fit.methods.trained.rows import AnswerRow, answer_row, log_probabilities
from steer.fit.states import Progress
from steer.model import HookPoint
from steer.spec import Where

LossName: TypeAlias = Literal["reps", "simpo", "lm"]
SIMPO_SCALE, SIMPO_MARGIN = 2.0, 1.0


@dataclass(frozen=True)
class PreferenceRow:
    """Both answers to one prompt as tokens, and log p of each to the unsteered model.

    Without a `rejected` answer only likelihood can be trained.
    """

    chosen: AnswerRow
    rejected: AnswerRow | None = None
    chosen_before: float = 0.0
    rejected_before: float = 0.0

    def turned(self) -> PreferenceRow:
        """The same with what to prefer and what to avoid exchanged."""
        assert self.rejected is not None
        return PreferenceRow(self.rejected, self.chosen, self.rejected_before, self.chosen_before)


def asked_rows(
    engine: Engine,
    preferences: PreferenceSet,
    instruction: str | None,
    *,
    place: Placement,
    loss: LossName,
    max_tokens: int,
    batch: int,
    progress: Progress | None = None,
) -> list[PreferenceRow]:
    """The rows that `loss` needs; answers that are missing are asked of the model
    (`steer.fit.data.answering.completed`, whose errors it raises)."""
    data = completed(
        engine,
        preferences,
        instruction,
        sides=sides_needed(loss),
        place=place,
        max_tokens=max_tokens,
        progress=progress,
    )
    return preference_rows(engine, data, both=loss != "lm", batch=batch)


def preference_rows(
    engine: Engine, preferences: PreferenceSet, *, both: bool, batch: int
) -> list[PreferenceRow]:
    """The rows of `preferences`, whose answers are all there; with those to avoid where `both`."""
    found = []
    for one in preferences.items:
        chosen = _row(engine, one, "chosen")
        found.append(PreferenceRow(chosen, _row(engine, one, "rejected") if both else None))
    if not both:
        return found
    before: list[float] = []
    rows = [row for one in found for row in (one.chosen, one.rejected) if row is not None]
    for first in range(0, len(rows), batch):
        before += differentiable(engine).differentiate(_unsteered(rows[first : first + batch]))
    return [
        PreferenceRow(one.chosen, one.rejected, *before[2 * n : 2 * n + 2])
        for n, one in enumerate(found)
    ]


def _row(engine: Engine, one: Preference, side: Side) -> AnswerRow:
    text = getattr(one, side)
    assert text is not None, "an answer is missing"
    return answer_row(engine, one.prompt, text, ends=side not in one.cut)


def _unsteered(rows: Sequence[AnswerRow]) -> Callable[[DifferentiableModel], list[float]]:
    def work(model: DifferentiableModel) -> list[float]:
        with torch.no_grad():
            return [float(one.sum()) for one in log_probabilities(model, rows, {}, None)]

    return work


def preference_loss(
    model: DifferentiableModel,
    rows: Sequence[PreferenceRow],
    edits: Mapping[HookPoint, Callable[[Tensor], Tensor]],
    where: Where | None,
    name: LossName,
) -> Tensor:
    """The mean loss of `rows` under `edits`."""
    both = name != "lm"
    answers = [
        row
        for one in rows
        for row in (one.chosen, one.rejected if both else None)
        if row is not None
    ]
    found = log_probabilities(model, answers, edits, where)
    if not both:
        return -torch.cat(found).mean()
    losses = [
        LOSSES[name](found[2 * n], found[2 * n + 1], one.chosen_before, one.rejected_before)
        for n, one in enumerate(rows)
    ]
    return torch.stack(losses).mean()


def reps(chosen: Tensor, rejected: Tensor, chosen_before: float, rejected_before: float) -> Tensor:
    """From log p of each answer's tokens, and of the answers before."""
    weight = max(rejected_before - chosen_before, 1.0)
    return -functional.logsigmoid(weight * chosen.mean() - rejected.mean())


def simpo(chosen: Tensor, rejected: Tensor, *_: float) -> Tensor:
    """From log p of each answer's tokens."""
    return -functional.logsigmoid(SIMPO_SCALE * (chosen.mean() - rejected.mean()) - SIMPO_MARGIN)


LOSSES: Mapping[str, Callable[[Tensor, Tensor, float, float], Tensor]] = MappingProxyType(
    {"reps": reps, "simpo": simpo}
)
"""Losses that compare, by name."""
