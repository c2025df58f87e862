"""Target runs with one state replaced each, batched together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Engine, GenerationRequest, SamplingParams
from steer.errors import SteerError
from steer.inspection.next_token import TokenChance, top_tokens
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import answer_text, token_texts
from steer.spec import Patch, SteeringSpec, Where

_AT_ONCE = 64


@dataclass(frozen=True)
class StatePatch:
    """A float32 state `[width]` read at `source` and `position`, to be put at `target`.

    `expected` is the token whose probability is to be reported.
    """

    position: int
    source: HookPoint
    target: HookPoint
    state: Float[Tensor, " width"]
    expected: int | None = None


@dataclass(frozen=True)
class TargetRun:
    """A prompt, with `patch` at the absolute position `place` where there is one.

    `expected` is the token whose probability is to be reported.
    """

    prompt: tuple[int, ...]
    place: int = 0
    patch: StatePatch | None = None
    expected: int | None = None


@dataclass(frozen=True)
class PatchedAnswer:
    """What one target run says: its likeliest next tokens, the expected token's chance, and what
    it generates."""

    top: tuple[TokenChance, ...]
    expected: TokenChance | None
    text: str | None


def patch_plan(patch: StatePatch, plans: PlanCache, place: int) -> SteeringPlan:
    """The plan that puts `patch` at the absolute position `place` of a prompt."""
    spec = SteeringSpec(
        interventions=(
            Patch(vector="state", layers=(patch.target.layer,), site=patch.target.site),
        ),
        where=Where(phases=("prompt",), positions=((place, place + 1),)),
    )
    vector = ControlVector.of(
        {patch.target.layer: patch.state}, name="state", site=patch.target.site
    )
    return plans.plan(spec, vectors={"state": vector})


def run_patched(
    engine: Engine,
    target: tuple[int, ...],
    place: int,
    patches: Sequence[StatePatch | None],
    *,
    top: int,
    max_tokens: int,
) -> list[PatchedAnswer]:
    """What one target prompt says under each patch (None: unpatched), all at the absolute position
    `place`."""
    runs = [
        TargetRun(target, place, patch, None if patch is None else patch.expected)
        for patch in patches
    ]
    return run_targets(engine, runs, top=top, max_tokens=max_tokens)


def run_targets(
    engine: Engine, runs: Sequence[TargetRun], *, top: int, max_tokens: int
) -> list[PatchedAnswer]:
    """What each run says, in their order.

    A bounded number of runs shares a batch, each with a plan of its own; text is generated
    greedily, none where `max_tokens` is 0.
    """
    # Those of one prompt that are patched at like layers together: an engine may compute what lies
    # below the lowest of them once.
    order = sorted(range(len(runs)), key=lambda n: (runs[n].prompt, _lowest(runs[n])))
    said = dict(
        zip(order, _in_order(engine, [runs[n] for n in order], top, max_tokens), strict=True)
    )
    return [said[n] for n in range(len(runs))]


def _lowest(run: TargetRun) -> int:
    """The layer that a run is patched at; below all layers where it is not."""
    return -1 if run.patch is None else run.patch.target.layer


def _in_order(
    engine: Engine, runs: Sequence[TargetRun], top: int, max_tokens: int
) -> list[PatchedAnswer]:
    """What each run says, a batch after the other."""
    cache = PlanCache(MemoryLibrary(), engine.info, engine.capabilities, size=1)
    at_once = min(_AT_ONCE, engine.capabilities.limits.get("slots", _AT_ONCE))
    answers: list[PatchedAnswer] = []
    for start in range(0, len(runs), at_once):
        part = runs[start : start + at_once]
        plans = [
            None if one.patch is None else patch_plan(one.patch, cache, one.place) for one in part
        ]
        captured = engine.capture(
            CaptureRequest(prompts=[one.prompt for one in part], plans=plans, logits="last")
        )
        logits = torch.stack([one.logits[-1] for one in captured if one.logits is not None])
        tops = top_tokens(logits, engine.tokenizer, top)
        expected = _expected(engine, [one.expected for one in part], logits)
        texts = _generated(engine, [one.prompt for one in part], plans, max_tokens)
        answers += map(PatchedAnswer, tops, expected, texts)
    return answers


def _expected(
    engine: Engine, tokens: Sequence[int | None], logits: Float[Tensor, "N vocab"]
) -> list[TokenChance | None]:
    """The chance of each run's expected token."""
    found: list[TokenChance | None] = []
    for token, chances in zip(tokens, logits.float().softmax(-1), strict=True):
        if token is None:
            found.append(None)
            continue
        (text,) = token_texts(engine.tokenizer, [token])
        found.append(TokenChance(token=text, id=token, probability=float(chances[token])))
    return found


def _generated(
    engine: Engine,
    prompts: Sequence[tuple[int, ...]],
    plans: Sequence[SteeringPlan | None],
    max_tokens: int,
) -> list[str | None]:
    if max_tokens == 0:
        return [None] * len(plans)
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0)
    runs = [
        GenerationRequest(f"patchscope-{number}", prompt, sampling, plan)
        for number, (prompt, plan) in enumerate(zip(prompts, plans, strict=True))
    ]
    try:
        done = engine.complete(runs)
    except SteerError as error:
        raise error.at("/target") from None
    return [answer_text(engine.tokenizer, one.tokens) for one in done]
