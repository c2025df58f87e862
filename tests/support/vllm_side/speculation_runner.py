"""Runs vLLM with Steer and a drafter: `python speculation_runner.py JOB.json …`.

A test's child process, with a process for each job (see `architecture_runner.py`). A job names a
`model`, a `speculative_config`, further `options` of vLLM, and where its results go.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest import mock

import vllm_engine
from architecture_runner import in_children
from vllm_simulation import core, steering

REQUESTS = 40


def run(job: dict[str, Any]) -> None:
    """Completes a mixed batch of steered requests, with an eye on the taps."""
    import demo_specs

    from steer.engines.vllm.taps.taps import EagerTap
    from steer.plan.cache import PlanCache

    options = {name: job[name] for name in ("model", "speculative_config")} | job["options"]
    with vllm_engine.start_engine(Path(job["registry"]), **options) as engine, ExitStack() as stack:
        runner = core(engine).model_executor.driver_worker.worker.model_runner
        model = runner.get_draft_model()
        told: dict[str, Any] = {"drafter": None if model is None else type(model).__name__}
        told |= {"drafts": 0, "taps": 0, "taps while drafting": 0}
        propose, visit, where = runner.drafter.propose, EagerTap.forward, "taps"

        def propose_watched(*args: Any, **named: Any) -> Any:
            nonlocal where
            where = "taps while drafting"
            told["drafts"] += 1
            try:
                return propose(*args, **named)
            finally:
                where = "taps"

        def visit_watched(self: EagerTap, *args: Any) -> Any:
            told[where] += 1
            return visit(self, *args)

        stack.enter_context(mock.patch.object(runner.drafter, "propose", propose_watched))
        stack.enter_context(mock.patch.object(EagerTap, "__call__", visit_watched))
        plans = demo_specs.compiled(PlanCache(demo_specs.LIBRARY, engine.info, engine.capabilities))
        requests = demo_specs.requests_for(plans, REQUESTS, seed=job["seed"])
        done = engine.complete(requests)
        told["slots in use"] = steering(engine).stats().slots_in_use
        told["answers"] = [
            {
                "tokens": one.tokens,
                "finish": one.finish,
                "receipt": one.receipt and one.receipt.as_json(),
            }
            for one in done
        ]
        Path(job["out"]).write_text(json.dumps(told))


if __name__ == "__main__":
    in_children([Path(name) for name in sys.argv[1:]], run)
