"""vLLM's GPU worker with steering; named in `worker_cls`."""

from __future__ import annotations

from vllm.v1.worker.gpu_worker import Worker

from steer.engines.vllm.worker.worker import SteerWorker


class SteerGPUWorker(SteerWorker, Worker):  # type: ignore[misc]
    """See `SteerWorker`."""
