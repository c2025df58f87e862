"""vLLM's CPU worker with steering; named in `worker_cls`."""

from __future__ import annotations

from vllm.v1.worker.cpu_worker import CPUWorker

from steer.engines.vllm.worker.worker import SteerWorker


class SteerCPUWorker(SteerWorker, CPUWorker):  # type: ignore[misc]
    """See `SteerWorker`."""
