"""A real server of `steer serve --engine vllm`, in processes of its own."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import httpx
from liveness import LIVENESS_SECONDS, VLLM_BOUNDS
from prometheus_client.parser import text_string_to_metric_families

OPTIONS = (
    "enforce_eager=true",
    "max_model_len=256",
    "max_num_seqs=16",
    "block_size=32",
    "gpu_memory_utilization=0.3",
    "enable_auto_tool_choice=true",
    "tool_call_parser=hermes",
    'structured_outputs_config={"backend": "xgrammar", "disable_any_whitespace": true}',
)


@contextmanager
def running_server(registry: Path, *arguments: str, **environment: str) -> Iterator[str]:
    """The URL of a server of the demo model over `registry`, stopped with all its processes."""
    port = _free_port()
    command = [
        str(Path(sys.executable).with_name("steer")),
        *("serve", "--engine", "vllm", "--model", "steer-demo", "--dtype", "float32"),
        *("--port", str(port), "--registry", str(registry)),
        *(part for option in OPTIONS for part in ("--engine-option", option)),
        *arguments,
    ]
    process = subprocess.Popen(
        command,
        env={
            **os.environ,
            **VLLM_BOUNDS,
            "OMP_NUM_THREADS": "1",
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
            "VLLM_LOGGING_LEVEL": "INFO",
            **environment,
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    log = _Log(process)
    try:
        if not log.up.wait(LIVENESS_SECONDS) or process.poll() is not None:
            raise AssertionError("the server did not start:\n" + "".join(log.lines[-80:]))
        yield f"http://127.0.0.1:{port}"
    finally:
        _stop(process)


def per_engine(http: httpx.Client, name: str) -> dict[str, float]:
    """A figure of vLLM's own, by engine."""
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(http.get("/metrics").text)
        for sample in family.samples
        if sample.name == name
    }


class _Log:
    """Reads what the server prints, and sees when it is up, or has ended."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.lines: list[str] = []
        self.up = threading.Event()
        self._process = process
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self.lines.append(line)
            if "Application startup complete" in line:
                self.up.set()
        self._process.wait()
        self.up.set()


def _stop(process: subprocess.Popen[str]) -> None:
    """Asks first; whatever is left in the server's own session is ended."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(LIVENESS_SECONDS)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def _free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port
