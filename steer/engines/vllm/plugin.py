"""What vLLM loads in each of its processes when the plugin `steer` is named.

A front end's configuration is changed where vLLM makes it: the worker and the scheduler become
subclasses of those that vLLM chose, and a stamp enters the key of the compile cache. Everything
else follows from that configuration in the processes that receive it, and fails closed there: the
scheduler refuses to start where blocks of the cache are not forked, the worker where steering does
not act.
"""

from __future__ import annotations

import functools
import os
from typing import Any

from steer.engines.vllm.options import ABI, KEY, SteerOptions
from steer.errors import Unsupported

NAME = "steer"
WORKERS = {
    "vllm.v1.worker.cpu_worker.CPUWorker": "steer.engines.vllm.worker.cpu_worker.SteerCPUWorker",
    "vllm.v1.worker.gpu_worker.Worker": "steer.engines.vllm.worker.gpu_worker.SteerGPUWorker",
}


def named() -> bool:
    """Whether this process was told to load the plugin by name: an installed package alone must
    not change anybody's engine."""
    return NAME in os.environ.get("VLLM_PLUGINS", "").split(",")


def register() -> None:
    """The entry point in `vllm.general_plugins`; may be called any number of times."""
    if not named():
        return
    from vllm.engine.arg_utils import EngineArgs  # noqa: PLC0415

    _patch_core()
    make = EngineArgs.create_engine_config
    if getattr(make, "steers", False):
        return

    @functools.wraps(make)
    def create_engine_config(self: Any, *args: Any, **named: Any) -> Any:
        config = make(self, *args, **named)
        configure(config)
        return config

    create_engine_config.steers = True  # type: ignore[attr-defined]
    EngineArgs.create_engine_config = create_engine_config


def _patch_core() -> None:
    """What the engine core does with tickets; without a ticket these do nothing."""
    from steer.engines.vllm.core.admission import (  # noqa: PLC0415
        PlanCheck,
        check_tickets,
    )
    from steer.engines.vllm.core.cache_keys import fork_block_keys  # noqa: PLC0415

    fork_block_keys()
    check_tickets(PlanCheck())


def configure(config: Any) -> None:
    """Makes a `VllmConfig` one that steers. Raises `Unsupported` for what cannot be steered."""
    parallel = config.parallel_config
    worker = WORKERS.get(parallel.worker_cls)
    if worker is None and parallel.worker_cls not in WORKERS.values():
        raise Unsupported(
            f"the worker {parallel.worker_cls!r} cannot be steered: use vLLM's CPU or GPU worker",
            code="unsupported_worker",
        )
    parallel.worker_cls = worker or parallel.worker_cls
    from steer.engines.vllm.core.scheduler import scheduler_name  # noqa: PLC0415

    config.scheduler_config.scheduler_cls = scheduler_name(config.scheduler_config)
    given = config.additional_config or {}
    options = SteerOptions.of(given).model_copy(update={"abi": ABI})
    config.additional_config = {**given, KEY: options.model_dump(mode="json")}
