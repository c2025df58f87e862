"""How far steering moves what the model would say next: KL between next-token distributions.

The unsteered answers are read again, once unsteered and once under each plan (teacher forcing), so
both distributions stand at the same tokens. Edits fall on the tokens they would fall on while
generating: selections are anchored at the end of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.engines.journal import remembered
from steer.engines.selecting import roles_under
from steer.errors import Unsupported
from steer.fit.measure.answers import Answer, Progress
from steer.plan.plan import SteeringPlan
from steer.readouts.measures import kl_divergence, log_total

BATCH = 8
"""Texts read at once. It bounds memory: 2 · batch · tokens · vocabulary floats."""

ROOM = 1 << 29
"""Bytes of unsteered distributions that are kept."""


class Distributions(NamedTuple):
    """The next-token distributions along a text: logits, and `log_total` of them."""

    logits: Float[Tensor, "T vocab"]
    total: Float[Tensor, " T"]

    def first(self, count: int) -> Distributions:
        return Distributions(self.logits[:count], self.total[:count])

    def divergence(self, logits: Float[Tensor, "T vocab"]) -> Float[Tensor, " T"]:
        """How far `logits` are from these."""
        return kl_divergence(logits, self.logits, reference_total=self.total)

    @property
    def bytes(self) -> int:
        return sum(part.numel() * part.element_size() for part in self)


class TokenChanges(NamedTuple):
    """Of every plan, the mean change of each token's log-probability in nats, and its mean
    probability; `before` is the mean probability without a plan. All float64."""

    change: Float[Tensor, "plans vocab"]
    probability: Float[Tensor, "plans vocab"]
    before: Float[Tensor, " vocab"]


class References:
    """The unsteered next-token distributions along answers, which plans are held against.

    Each is read once, when it is first needed, and kept while all that are kept fit into `room`
    bytes; those beyond are read again for every call.

    Guarantees: `divergences` reads `batch` texts at once, under plans that may all be different.
    """

    def __init__(
        self, engine: Engine, answers: Sequence[Answer], *, batch: int = BATCH, room: int = ROOM
    ) -> None:
        self.answers = tuple(answers)
        self._engine, self._batch, self._room = engine, batch, room
        self._kept: dict[int, Distributions] = {}

    def first(self, count: int, tokens: int) -> References:
        """The same along the first `tokens` tokens of the first `count` answers alone; what was
        read is not read again."""
        fewer = References(
            self._engine,
            [replace(one, tokens=one.tokens[:tokens]) for one in self.answers[:count]],
            batch=self._batch,
            room=self._room,
        )
        fewer._kept = {n: one.first(tokens + 1) for n, one in self._kept.items() if n < count}
        return fewer

    def divergences(
        self, plans: Sequence[SteeringPlan], *, progress: Progress | None = None
    ) -> Float[Tensor, "plans answers"]:
        """For each plan and each unsteered answer, the KL in nats of the steered next-token
        distribution from the unsteered one, in float64.

        Averaged over the distributions that choose the answer's tokens and the one after its last.
        Raises `Unsupported` for plans with gates, and as the engine does.
        """
        found = torch.zeros(len(plans), len(self.answers), dtype=torch.float64)
        for first in range(0, len(self.answers), self._batch):
            group = range(first, min(first + self._batch, len(self.answers)))
            texts = [
                (one.prompt, one.tokens, *self._whose(plans, one))
                for one in self.answers[group.start : group.stop]
            ]
            found[:, group.start : group.stop] = remembered(
                self._engine,
                ["kl", [one.fingerprint for one in plans], texts],
                partial(self._group, plans, group),
            )
            if progress is not None:
                progress(len(group))
        return found

    def token_changes(self, plans: Sequence[SteeringPlan]) -> TokenChanges:
        """What each plan does to every token of the vocabulary, averaged over all distributions of
        all answers. Raises as `divergences`."""
        vocabulary = self._engine.info.vocab_size
        change = torch.zeros(len(plans), vocabulary, dtype=torch.float64)
        probability = torch.zeros(len(plans), vocabulary, dtype=torch.float64)
        before = torch.zeros(vocabulary, dtype=torch.float64)
        count = sum(len(one.tokens) + 1 for one in self.answers)
        for column in range(len(self.answers)):
            plain = self._unsteered([column])[column].logits.double().log_softmax(-1)
            before += plain.exp().sum(0) / count
            for start in range(0, len(plans), self._batch):
                together = plans[start : start + self._batch]
                for row, logits in enumerate(self._read([(plan, column) for plan in together])):
                    steered = logits.double().log_softmax(-1)
                    # What both rule out has no change, and not one that is no number.
                    apart = (steered - plain).nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
                    change[start + row] += apart.sum(0) / count
                    probability[start + row] += steered.exp().sum(0) / count
        return TokenChanges(change, probability, before)

    def _whose(self, plans: Sequence[SteeringPlan], answer: Answer) -> Sequence[object]:
        """What tells an answer's prompt from another of the same tokens, where a plan asks whose
        words they are."""
        each = [roles_under(self._engine, plan, answer.asked) for plan in plans]
        return [one.ranges for one in each if one is not None][:1]

    def _group(self, plans: Sequence[SteeringPlan], group: range) -> Float[Tensor, "plans answers"]:
        """The divergences on a few answers, `batch` texts at once."""
        plain = self._unsteered(group)
        found = torch.zeros(len(plans), len(group), dtype=torch.float64)
        # One answer under all plans comes together, so that what is unsteered is read once.
        cells = [(row, column) for column in group for row in range(len(plans))]
        for start in range(0, len(cells), self._batch):
            together = cells[start : start + self._batch]
            steered = self._read([(plans[row], column) for row, column in together])
            for (row, column), p in zip(together, steered, strict=True):
                found[row, column - group.start] = plain[column].divergence(p).mean()
        return found

    def _unsteered(self, group: Sequence[int]) -> dict[int, Distributions]:
        missing = [column for column in group if column not in self._kept]
        rows = self._read([(None, c) for c in missing])
        read = {c: Distributions(one, log_total(one)) for c, one in zip(missing, rows, strict=True)}
        for column, one in read.items():
            if sum(kept.bytes for kept in self._kept.values()) + one.bytes <= self._room:
                self._kept[column] = one
        return {column: read[column] if column in read else self._kept[column] for column in group}

    def _read(
        self, cells: Sequence[tuple[SteeringPlan | None, int]]
    ) -> list[Float[Tensor, "T vocab"]]:
        """The logits along each answer under its plan, from the last prompt token on."""
        if not cells:
            return []
        answers = [self.answers[column] for _, column in cells]
        plans = [
            None if plan is None else anchored(plan, len(answer.prompt))
            for (plan, _), answer in zip(cells, answers, strict=True)
        ]
        texts = [answer.prompt + answer.tokens for answer in answers]
        tail = 1 + max(len(answer.tokens) for answer in answers)
        roles = [
            roles_under(self._engine, plan, answer.asked, answer=len(answer.tokens))
            for (plan, _), answer in zip(cells, answers, strict=True)
        ]
        captured = self._engine.capture(
            CaptureRequest(texts, plans=plans, logits="all", tail=tail, roles=roles)
        )
        rows = []
        for answer, one in zip(answers, captured, strict=True):
            if one.logits is None:
                raise AssertionError("logits were asked for")
            # A copy: the view would keep the longest answer's logits.
            rows.append(one.logits[-len(answer.tokens) - 1 :].clone())
        return rows


def divergences(
    engine: Engine,
    answers: Sequence[Answer],
    plans: Sequence[SteeringPlan],
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Float[Tensor, "plans answers"]:
    """`References.divergences`, for answers that are needed once."""
    return References(engine, answers, batch=batch, room=0).divergences(plans, progress=progress)


def anchored(plan: SteeringPlan, prompt_length: int, what: str = "the KL") -> SteeringPlan:
    """The plan that edits, in a text read as one prompt, what `plan` edits while it is generated
    after a prompt of `prompt_length` tokens. Raises `Unsupported` for gated plans, of which `what`
    is not known then."""
    if plan.gated:
        raise Unsupported(
            f"{what} under a gated spec cannot be read afterwards: leave out 'when'",
            code="unsupported_gate",
        )
    passes = tuple(
        replace(one, selection=one.selection.anchored(prompt_length)) for one in plan.rules
    )
    name = f"{plan.fingerprint} anchored at {prompt_length}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return replace(plan, fingerprint=digest, rules=passes)
