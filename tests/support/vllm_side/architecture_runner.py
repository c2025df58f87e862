"""Runs vLLM with Steer over a list of models: `python architecture_runner.py JOB.json …`.

A test's child process. Each job has a process of its own, forked after vLLM is imported, because
an engine cannot be torn down completely. A job names a model folder, prompts with their
`extra_args`, and where its results go: a JSON file, with the states and logits beside it.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from steer.model import ModelInfo
    from steer.spec import Site


def in_children(jobs: list[Path], run: Callable[[dict[str, Any]], None]) -> None:
    """Runs each job in a process of its own, one after another."""
    from steer.engines.vllm import plugin

    plugin.register()
    import vllm.v1.engine.llm_engine
    import vllm.v1.worker.cpu_model_runner
    import vllm.v1.worker.cpu_worker  # noqa: F401
    from vllm.model_executor.models import registry

    # vLLM looks at each new model class in a process that imports all of vLLM again.
    registry._run_in_subprocess = lambda look: look()

    for job in jobs:
        child = os.fork()
        if child == 0:
            try:
                run(json.loads(job.read_text()))
            except BaseException:
                traceback.print_exc()
                os._exit(1)
            os._exit(0)
        os.waitpid(child, 0)


def _run(job: dict[str, Any]) -> None:
    from vllm import LLM

    from steer.engines.vllm.messages import read_info
    from steer.errors import SteerError

    out = Path(job["out"])
    try:
        llm = LLM(
            job["model"],
            dtype=job["dtype"],
            enforce_eager=not job["compiled"],
            skip_tokenizer_init=True,
            max_model_len=64,
            max_num_seqs=job["max_num_seqs"],
            max_num_batched_tokens=512,
            block_size=32,
            gpu_memory_utilization=0.3,
            limit_mm_per_prompt={"image": 0, "video": 0},  # models that see are asked in words
            max_logprobs=-1,
            logprobs_mode="raw_logits",
            additional_config={"steer": {"sites": "all"}},
        )
    except SteerError as error:
        out.write_text(json.dumps({"error": error.code, "message": error.message}))
        return
    info = llm.collective_rpc("steer_info")[0]
    tensors = _ask(llm, job["requests"], read_info(info)) if job["requests"] else {}
    refusals: dict[str, str] = {}
    if "inside" in job:
        tensors |= _look_inside(llm, refusals)
    from safetensors.torch import save_file

    save_file(tensors, out.with_suffix(".safetensors"))
    out.write_text(json.dumps({"info": info, "refusals": refusals}))


def _look_inside(llm: Any, refusals: dict[str, str]) -> dict[str, Any]:
    """What heads and neurons are made of, and the codes of what is refused, by name."""
    from inside_answers import matrices

    found = matrices(_engine(llm), refusals=refusals)
    return {f"inside/{name}": one.contiguous() for name, one in found.items()}


def _engine(llm: Any) -> Any:
    """Over an `LLM` without a tokenizer."""
    from steer.engines.vllm.front.drivers import InlineDriver
    from steer.engines.vllm.front.engine import VllmEngine
    from steer.engines.vllm.front.ticket_issuer import TicketIssuer
    from steer.engines.vllm.options import registry_location
    from steer.registry.blobs.plan_store import PlanStore

    driver, issuer = InlineDriver(llm), TicketIssuer(PlanStore(registry_location()))
    return VllmEngine(driver, None, driver.rpc("steer_info"), issuer, frozenset())


def _ask(llm: Any, requests: list[dict[str, Any]], model: ModelInfo) -> dict[str, Any]:
    """All requests in one batch; `name/point` are their states `[T, d]`, `name/logits` those of
    the last token `[vocab]`, `name/unembedded` what the last state unembeds to, and where it is
    asked for `name/layer.weights` and `name/layer.values` what the heads of a layer attend to."""
    import torch
    from vllm import SamplingParams

    from steer.engines.vllm.messages import pack, read_attention, unpack
    from steer.errors import Unsupported
    from steer.model import HookPoint

    params = [
        SamplingParams(
            max_tokens=1,
            temperature=0.0,
            detokenize=False,
            logprobs=-1,
            skip_reading_prefix_cache=True,
            extra_args=request["extra_args"],
        )
        for request in requests
    ]
    prompts = [{"prompt_token_ids": request["prompt"]} for request in requests]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    found: dict[str, torch.Tensor] = {}
    for request, output in zip(requests, outputs, strict=True):
        name, scores = request["name"], output.outputs[0].logprobs[0]
        logits = torch.tensor([scores[token].logprob for token in range(len(scores))])
        found[f"{name}/logits"] = logits
        captured = llm.collective_rpc("steer_captured", args=([request["key"]],))[0][0]
        told = {key: captured.pop(key) for key in list(captured) if key.startswith("attention.")}
        if told:
            length = len(request["prompt"])
            layers = range(model.n_layers)
            read = read_attention(told, layers, length, length, model.head_dim or 0)
            for layer, one in read.items():
                found[f"{name}/{layer}.weights"] = one.weights.contiguous()
                found[f"{name}/{layer}.values"] = one.values.contiguous()
        for point, data in captured.items():
            width = model.width(cast("Site", point.partition(".")[2]))
            found[f"{name}/{point}"] = unpack(data, width)
        if "queried" in request:
            layer, states = request["queried"], torch.tensor(request["states"])
            answer = llm.collective_rpc("steer_queries", args=(layer, pack(states)))[0]
            for part in ("queries", "keys") if "error" not in answer else ():
                rows = unpack(answer[part], len(answer[part]) // (4 * len(states)))
                found[f"{name}/{part}"] = rows.unflatten(-1, (answer["heads"], -1)).contiguous()
        for layer, start, end, rows in request.get("carried", ()):
            ends = HookPoint(layer, start), HookPoint(layer, end)
            with suppress(Unsupported):
                made = _engine(llm).carry(*ends, torch.tensor(rows))
                found[f"{name}/{start} to {end}"] = made.contiguous()
        last = found[f"{name}/{request['last']}"][-1:]
        answer = llm.collective_rpc("steer_unembed", args=(pack(last),))[0]
        found[f"{name}/unembedded"] = unpack(answer, len(logits))[0].contiguous()
    return found


if __name__ == "__main__":
    in_children([Path(name) for name in sys.argv[1:]], _run)
