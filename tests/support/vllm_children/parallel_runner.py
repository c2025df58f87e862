"""vLLM over several processes, with Steer: `python parallel_runner.py JOB.json`.

A test's child process: vLLM spawns its engine core and its workers from here. The job names the
registry, vLLM's options, how the engine is driven, and the file that takes what came of it. Its
requests are those that the test makes for the reference (`sample`).
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import signal
import sys
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import demo_specs
import inside_answers
import torch
import vllm_engine
from artefacts import random_vector
from vllm_engine import Plans

from steer.engines.base import (
    CaptureRequest,
    Completion,
    Engine,
    GenerationRequest,
    SamplingParams,
)
from steer.engines.vllm.front.engine import VllmEngine
from steer.errors import SteerError
from steer.model import HookPoint
from steer.plan.cache import PlanCache
from steer.plan.plan import SteeringPlan
from steer.registry.blobs.plan_store import PlanStore
from steer.registry.registry import Registry
from steer.spec import SITES

LATE = "late"
CONTEXT = 1 << 16
"""Tokens that a sequence may have. A request that has all of them does not end by itself before it
is told to: what it has to outlast takes a few dozen steps."""
LATE_SPEC = demo_specs.one(demo_specs.add(LATE, strength=0.6))
CAPTURED = (
    "unsteered",
    "everything",
    "a clamp that competes",
    "ablate at attn_out",
    "low rank at head_out",
    "norm preserved at mlp_act",
)
PROMPT = tuple(random.Random(4).randrange(3, demo_specs.VOCABULARY) for _ in range(40))
PROMPTS = ((5, 9, 200, 31), tuple(range(40, 75)), (7,))


def late_vector() -> Any:
    """The vector that is uploaded while requests run."""
    return random_vector(77, *range(demo_specs.LAYERS), width=demo_specs.WIDTH)


def sample(plans: Plans) -> list[GenerationRequest]:
    """Two greedy requests for each spec, in a mixed order."""
    return demo_specs.requests_for(plans, 2 * len(plans), seed=11)


def same_request(plan: SteeringPlan | None, name: str, tokens: int = 12) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=tokens, temperature=0, logprobs=2, ignore_eos=True)
    return GenerationRequest(name, PROMPT, sampling, plan)


def as_json(done: Completion) -> dict[str, Any]:
    return {
        "tokens": list(done.tokens),
        "logprobs": [[one.logprob, [list(pair) for pair in one.top]] for one in done.logprobs],
        "finish": done.finish,
        "receipt": None if done.receipt is None else done.receipt.as_json(),
    }


def capture_all(engine: Engine, plans: Plans) -> dict[str, torch.Tensor]:
    """States at every hook point, logits, and unembedded last states, for some specs; and the rows
    of tokens from every part of the vocabulary."""
    points = tuple(HookPoint(layer, site) for layer in range(demo_specs.LAYERS) for site in SITES)
    found = {"token rows": engine.token_rows(list(range(1, demo_specs.VOCABULARY, 300)))}
    for name in CAPTURED:
        request = CaptureRequest(PROMPTS, points, plans=[plans[name]] * 3, logits="all")
        for number, one in enumerate(engine.capture(request)):
            for point, states in one.states.items():
                found[f"{name}/{number}/{point}"] = states
            assert one.logits is not None
            found[f"{name}/{number}/logits"] = one.logits
            found[f"{name}/{number}/unembedded"] = engine.unembed(one.states[HookPoint(5)])
    return found


def look_inside(engine: Engine) -> dict[str, torch.Tensor]:
    """What looks inside heads and neurons."""
    found = inside_answers.matrices(engine) | inside_answers.inspections(engine)
    return {f"inside/{name}": one for name, one in found.items()}


def _run(engine: VllmEngine, plans: Plans, job: Mapping[str, Any]) -> dict[str, Any]:
    requests = sample(plans)
    done = engine.complete(requests)
    torch.save(capture_all(engine, plans) | look_inside(engine), job["tensors"])
    stats = engine.stats()
    return {
        "completions": {
            request.id: as_json(one) for request, one in zip(requests, done, strict=True)
        },
        "in use": [stats.slots_in_use, stats.requests_running],
        "gate scopes": list(engine.capabilities.gate_scopes),
    }


def _error(engine: VllmEngine, request: GenerationRequest) -> str:
    """The code of the error that `request` ends with."""
    try:
        engine.complete([request])
    except SteerError as error:
        return error.code
    return "none"


def load(job: Mapping[str, Any]) -> dict[str, Any]:
    """An engine as a library: `VllmEngine.load`, whose core runs in a process of its own."""
    with VllmEngine.load(registry=job["registry"], **job["options"]) as engine:
        return _run(engine, vllm_engine.plans_for(engine), job)


async def client(job: Mapping[str, Any]) -> dict[str, Any]:
    """An engine as vLLM's server has it: asynchronous, used from the event loop and from threads.

    In the end its core is killed, and another takes its place.
    """
    os.environ["STEER_REGISTRY"] = job["registry"]
    server = start_client(job["options"])
    engine = await VllmEngine.of_client(server, server.get_tokenizer())
    # Compiling asks the workers, and so waits for the event loop.
    plans = await asyncio.to_thread(vllm_engine.plans_for, engine)
    result = await asyncio.to_thread(_run, engine, plans, job)
    result["late"] = await _upload_while_running(engine, plans, job["registry"])

    before = same_request(plans["everything"], "before")
    result["before"] = as_json((await asyncio.to_thread(engine.complete, [before]))[0])
    for process in server.engine_core.resources.engine_manager.processes:
        os.kill(process.pid, signal.SIGKILL)
        process.join()
    result["dead"] = await asyncio.to_thread(_error, engine, before)
    server.shutdown()

    again = await VllmEngine.of_client(start_client(job["options"]), None)
    again.tickets = engine.tickets
    PlanStore.put = _refuse_put  # type: ignore[method-assign]
    restarted = await asyncio.to_thread(again.complete, [before])
    result["restarted"] = as_json(restarted[0])
    return result


def start_client(options: Mapping[str, Any]) -> Any:
    """vLLM's asynchronous engine."""
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.v1.engine.async_llm import AsyncLLM

    return AsyncLLM.from_engine_args(AsyncEngineArgs(**options))


def _refuse_put(self: PlanStore, data: bytes) -> str:
    raise AssertionError("the plan was published anew")


async def _upload_while_running(engine: VllmEngine, plans: Plans, registry: str) -> dict[str, Any]:
    """A vector is registered, and used, while other requests are in the middle of theirs; those
    go on until they are told to stop."""
    enough = threading.Event()
    length = CONTEXT - len(PROMPT)
    long = [
        replace(
            same_request(plans["every layer"], f"long {n}", tokens=length),
            stop=lambda token: enough.is_set(),
        )
        for n in range(4)
    ]
    streams = [engine.generate(one) for one in long]
    seen = [[(await anext(stream)).token for _ in range(3)] for stream in streams]
    with Registry.open(registry) as opened:
        await asyncio.to_thread(opened.add, LATE, late_vector())
        late = PlanCache(opened, engine.info, engine.capabilities)
        plan = late.plan(demo_specs.parse_spec(LATE_SPEC))
    request = same_request(plan, "late")
    done = (await asyncio.to_thread(engine.complete, [request]))[0]
    others = (await asyncio.to_thread(engine.stats)).requests_running
    enough.set()
    ends = []
    for tokens, stream in zip(seen, streams, strict=True):
        async for event in stream:
            tokens.append(event.token)
        ends.append([event.finish, event.receipt is not None and event.receipt.as_json()])
    return {"done": as_json(done), "others": others, "long": seen, "ends": ends}


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    result = asyncio.run(client(job)) if job["as_client"] else load(job)
    Path(job["out"]).write_text(json.dumps(result))
    # vLLM's own processes end with this one.
    sys.stdout.flush()


if __name__ == "__main__":
    assert vllm_engine.ENVIRONMENT
    main(Path(sys.argv[1]))
