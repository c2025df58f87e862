"""Prompts with states put into their places, answered together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import ControlVector
from steer.artefacts.library import MemoryLibrary
from steer.artefacts.lora import Lora
from steer.artefacts.oracle_form import OracleForm
from steer.engines.base import Engine, GenerationRequest, SamplingParams
from steer.engines.oracle_prompt import OraclePrompt
from steer.inspection.oracles.result import Said
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.prompts import answer_text
from steer.spec import Add, Intervention, NormStrength, Patch, SteeringSpec, Where

_AT_ONCE = 64


@dataclass(frozen=True)
class OracleRun:
    """A prompt, and the states `[k, width]` for its places; none where it has none to show."""

    prompt: OraclePrompt
    states: Float[Tensor, "k width"] | None = None


def oracle_plan(
    form: OracleForm, prompt: OraclePrompt, states: Float[Tensor, "k width"], plans: PlanCache
) -> SteeringPlan:
    """The plan that puts each state where it stands in `prompt`, as `form` says."""
    vectors: dict[str, ControlVector] = {}
    items: list[Intervention] = []
    for number, (state, places) in enumerate(zip(states, prompt.places, strict=True)):
        name = f"state-{number}"
        vectors[name] = ControlVector.of({form.layer: state}, name=name, site=form.site)
        where = Where(phases=("prompt",), positions=tuple((n, n + 1) for n in places))
        layers = (form.layer,)
        if form.mode == "replace":
            items.append(Patch(vector=name, layers=layers, site=form.site, where=where))
        else:
            strength = NormStrength(norm=form.strength)
            items.append(
                Add(vector=name, layers=layers, site=form.site, where=where, strength=strength)
            )
    return plans.plan(SteeringSpec(interventions=tuple(items)), vectors=vectors)


def run_oracle(
    engine: Engine,
    form: OracleForm,
    lora: Lora | None,
    runs: Sequence[OracleRun],
    *,
    max_tokens: int,
) -> list[Said]:
    """What is answered in each run, greedily; a bounded number shares a batch. What is the same
    prompt without states is asked once."""
    plans = PlanCache(MemoryLibrary(), engine.info, engine.capabilities, size=1)
    at_once = min(_AT_ONCE, engine.capabilities.limits.get("slots", _AT_ONCE))
    sampling = SamplingParams(max_tokens=max_tokens, temperature=0, logprobs=0)
    plain = {run.prompt.ids: n for n, run in reversed(list(enumerate(runs))) if run.states is None}
    asked = [
        n for n, run in enumerate(runs) if plain.get(run.prompt.ids, n) == n or not _plain(run)
    ]
    said: dict[int, Said] = {}
    for first in range(0, len(asked), at_once):
        part = asked[first : first + at_once]
        requests = []
        for n in part:
            run = runs[n]
            plan = None if run.states is None else oracle_plan(form, run.prompt, run.states, plans)
            requests.append(
                GenerationRequest(f"ask-{n}", run.prompt.ids, sampling, plan, lora=lora)
            )
        for n, done in zip(part, engine.complete(requests), strict=True):
            text = answer_text(engine.tokenizer, done.tokens).strip()
            said[n] = Said(text=text, probability=_mean([one.logprob for one in done.logprobs]))
    return [said[n if not _plain(run) else plain[run.prompt.ids]] for n, run in enumerate(runs)]


def permuted(states: Float[Tensor, "k width"]) -> Float[Tensor, "k width"]:
    """The same numbers at other coordinates, always the same ones: as long, and of nothing."""
    generator = torch.Generator().manual_seed(0)
    return states[:, torch.randperm(states.shape[1], generator=generator)]


def _plain(run: OracleRun) -> bool:
    return run.states is None


def _mean(logprobs: Sequence[float]) -> float:
    return math.exp(sum(logprobs) / len(logprobs)) if logprobs else 1.0
