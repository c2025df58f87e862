"""Mixtures of experts on two data-parallel engines, which run in step: `python experts_runner.py
JOB.json`.

A test's child process: vLLM spawns its engine cores from here. Tokens travel between the engines to
the experts that they choose; vLLM's communicator for CPUs has not the two collectives that they
travel by, so all processes are given them here, over the group that it has.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import parallel_runner
import torch
import vllm_engine
from artefacts import random_vector
from tiny_models import LAYERS, VOCABULARY
from torch import Tensor
from vllm.distributed.device_communicators.cpu_communicator import CpuCommunicator
from vllm_models import WIDTH

from steer.artefacts.library import MemoryLibrary
from steer.engines.base import CaptureRequest, Engine, GenerationRequest, SamplingParams
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import SteerError
from steer.model import Capabilities, HookPoint, ModelInfo
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.spec import KINDS, parse_spec

VECTOR = random_vector(3, *range(LAYERS), width=WIDTH)
ADD = {"kind": "add", "vector": "v", "strength": 2.0}
GATE = {"vector": "v", "layer": 0, "above": 0.0, "scope": "token"}
SPECS: dict[str, Any] = {
    "unsteered": None,
    "everything": {"interventions": [ADD]},
    "generation": {"interventions": [ADD], "where": {"phases": ["generation"]}},
    "ablate": {"interventions": [{"kind": "ablate", "vector": "v"}]},
    "norm preserved": {"interventions": [ADD], "norm": "preserve"},
    "a gate": {"interventions": [{**ADD, "layers": [1, 2], "when": GATE}]},
}
PROMPTS = ((5, 9, 20, 31), tuple(range(40, 75)), (7,))
CAPTURED = HookPoint(LAYERS - 1)
STATES = torch.randn(5, WIDTH, generator=torch.Generator().manual_seed(6))


def _gathered(communicator: Any, x: Tensor, sizes: Sequence[int]) -> Tensor:
    """The rows of all ranks, of which each has so many as `sizes` says."""
    most = max(sizes)
    own = torch.zeros(most, *x.shape[1:], dtype=x.dtype)
    own[: len(x)] = x
    every = [torch.empty_like(own) for _ in sizes]
    torch.distributed.all_gather(every, own, group=communicator.cpu_group)
    return torch.cat([one[:size] for one, size in zip(every, sizes, strict=True)])


def all_gatherv(self: Any, input_: Any, dim: int = 0, sizes: Any = None) -> Any:
    """As `GroupCoordinator.all_gatherv` says."""
    assert dim == 0
    several = isinstance(input_, list)
    found = [
        _gathered(self, one, sizes or [len(one)] * self.world_size)
        for one in (input_ if several else [input_])
    ]
    return found if several else found[0]


def reduce_scatterv(self: Any, input_: Tensor, dim: int = -1, sizes: Any = None) -> Tensor:
    """As `GroupCoordinator.reduce_scatterv` says."""
    assert dim == 0
    whole = input_.clone()
    torch.distributed.all_reduce(whole, group=self.cpu_group)
    parts = sizes or [len(whole) // self.world_size] * self.world_size
    return whole.split(list(parts))[self.rank_in_group].contiguous()


# At the top, because a process that vLLM spawns imports this before anything else.
CpuCommunicator.all_gatherv = all_gatherv  # type: ignore[method-assign]
CpuCommunicator.reduce_scatterv = reduce_scatterv  # type: ignore[method-assign]


def plans_for(info: ModelInfo) -> dict[str, SteeringPlan | None]:
    """Plans of `SPECS`."""
    able = Capabilities("vllm", KINDS, info.sites)
    cache = PlanCache(MemoryLibrary({"v": VECTOR}), info, able)
    return {
        name: None if spec is None else cache.plan(parse_spec(spec)) for name, spec in SPECS.items()
    }


def requests(plans: dict[str, SteeringPlan | None], rounds: int) -> list[GenerationRequest]:
    """Greedy requests for each spec, in a mixed order, of prompts and answers of all lengths."""
    draw = random.Random(5)
    names = [name for name in plans for _ in range(rounds)]
    draw.shuffle(names)
    return [
        GenerationRequest(
            f"{n} {name}",
            tuple(draw.randrange(3, VOCABULARY) for _ in range(draw.randrange(1, 40))),
            SamplingParams(
                max_tokens=draw.randrange(1, 14), temperature=0, logprobs=1, ignore_eos=True
            ),
            plans[name],
        )
        for n, name in enumerate(names)
    ]


def crowd_and_loners(plans: dict[str, SteeringPlan | None]) -> list[list[GenerationRequest]]:
    """A crowd on both engines, and requests each alone, beside which the other engine runs passes
    of nothing."""
    return [requests(plans, 4), *([one] for one in requests(plans, 1))]


def captured(engine: Engine, plans: dict[str, SteeringPlan | None]) -> dict[str, Tensor]:
    """Last states and logits under each spec, and what lies before the experts."""
    found: dict[str, Tensor] = {}
    for name, plan in plans.items():
        request = CaptureRequest(PROMPTS, (CAPTURED,), plans=[plan] * len(PROMPTS), logits="all")
        for number, one in enumerate(engine.capture(request)):
            assert one.logits is not None
            found[f"{name}/{number}/states"] = one.states[CAPTURED]
            found[f"{name}/{number}/logits"] = one.logits
    handed = engine.queries_and_keys(1, STATES)
    found["queries"], found["keys"] = handed.queries, handed.keys
    ends = HookPoint(1, "resid_pre"), HookPoint(1, "head_out")
    found["carried"] = engine.carry(*ends, STATES)
    return found


def _code(engine: Engine) -> str:
    try:
        engine.carry(HookPoint(1, "resid_pre"), HookPoint(1, "resid_post"), STATES)
    except SteerError as error:
        return error.code
    return "none"


def _run(engine: VllmEngine, job: dict[str, Any]) -> dict[str, Any]:
    plans = plans_for(engine.info)
    done: dict[str, Any] = {}
    for wave, group in enumerate(crowd_and_loners(plans)):
        for request, one in zip(group, engine.complete(group), strict=True):
            done[f"{wave} {request.id}"] = parallel_runner.as_json(one)
    torch.save(captured(engine, plans), job["tensors"])
    code = _code(engine)
    (last,) = engine.complete(requests(plans, 1)[:1])
    stats = engine.stats()
    return {
        "completions": done,
        "behind the experts": code,
        "afterwards": parallel_runner.as_json(last),
        "in use": [stats.slots_in_use, stats.requests_running],
    }


async def _main(job: dict[str, Any]) -> dict[str, Any]:
    os.environ["STEER_REGISTRY"] = job["registry"]
    server = parallel_runner.start_client(job["options"])
    engine = await VllmEngine.of_client(server, None)
    try:
        return await asyncio.to_thread(_run, engine, job)
    finally:
        server.shutdown()


if __name__ == "__main__":
    assert vllm_engine.ENVIRONMENT
    asked = json.loads(Path(sys.argv[1]).read_text())
    answers = asyncio.run(_main(asked))
    Path(asked["out"]).write_text(json.dumps(answers))
    sys.stdout.flush()
