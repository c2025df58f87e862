"""How far steering moves what the model would say next: KL between next-token distributions.

The unsteered answers are read again, once unsteered and once under each plan (teacher forcing), so
both distributions stand at the same tokens. Edits fall on the tokens they would fall on while
generating: selections are anchored at the end of the prompt.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor

from steer.engines.base import CaptureRequest, Engine
from steer.errors import Unsupported
from steer.fit.measure.answers import Answer, Progress
from steer.plan.plan import SteeringPlan

BATCH = 8
"""Answers read at once. It bounds memory: 2 · batch · tokens · vocabulary floats."""


def divergences(
    engine: Engine,
    answers: Sequence[Answer],
    plans: Sequence[SteeringPlan],
    *,
    batch: int = BATCH,
    progress: Progress | None = None,
) -> Float[Tensor, "plans answers"]:
    """For each plan and each unsteered answer, the KL in nats of the steered next-token
    distribution from the unsteered one, in float64.

    Averaged over the distributions that choose the answer's tokens and the one after its last.
    Raises `Unsupported` for plans with gates, and as the engine does.
    """
    found = torch.zeros(len(plans), len(answers), dtype=torch.float64)
    for first in range(0, len(answers), batch):
        group = answers[first : first + batch]
        plain = _read(engine, group, None)
        for row, plan in enumerate(plans):
            steered = _read(engine, group, plan)
            for column, (p, q) in enumerate(zip(steered, plain, strict=True)):
                found[row, first + column] = kl_divergence(p, q).mean()
        if progress is not None:
            progress(len(group))
    return found


def kl_divergence(
    logits: Float[Tensor, "T vocab"], reference: Float[Tensor, "T vocab"]
) -> Float[Tensor, " T"]:
    """KL(p ‖ q) in nats, p and q the softmax of `logits` and `reference`; exact in float64."""
    p = logits.double().log_softmax(-1)
    q = reference.double().log_softmax(-1)
    # 0 · log 0 is 0: a token that p rules out adds nothing, whatever q says.
    terms = torch.where(p == -torch.inf, 0.0, p.exp() * (p - q))
    return terms.sum(-1).clamp(min=0.0)


def anchored(plan: SteeringPlan, prompt_length: int) -> SteeringPlan:
    """The plan that edits, in a text read as one prompt, what `plan` edits while it is generated
    after a prompt of `prompt_length` tokens. Raises `Unsupported` for gated plans."""
    if plan.gated:
        raise Unsupported(
            "the KL of a gated spec is not measured: leave out 'when'", code="unsupported_gate"
        )
    passes = tuple(
        replace(one, selection=one.selection.anchored(prompt_length)) for one in plan.rules
    )
    name = f"{plan.fingerprint} anchored at {prompt_length}"
    digest = hashlib.sha256(name.encode()).hexdigest()[:32]
    return replace(plan, fingerprint=digest, rules=passes)


def _read(
    engine: Engine, answers: Sequence[Answer], plan: SteeringPlan | None
) -> list[Float[Tensor, "T vocab"]]:
    """The logits along each answer, from the last prompt token on."""
    texts = [answer.prompt + answer.tokens for answer in answers]
    plans = [None if plan is None else anchored(plan, len(a.prompt)) for a in answers]
    captured = engine.capture(CaptureRequest(texts, plans=plans, logits="all"))
    rows = []
    for answer, one in zip(answers, captured, strict=True):
        if one.logits is None:
            raise AssertionError("logits were asked for")
        rows.append(one.logits[len(answer.prompt) - 1 :])
    return rows
