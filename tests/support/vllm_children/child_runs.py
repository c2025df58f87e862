"""vLLM over several processes: a script in a process of its own, and all of vLLM's below it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from liveness import LIVENESS_SECONDS

EXECUTOR = os.environ.get("STEER_TEST_EXECUTOR")
"""How vLLM runs its workers, where it is not to choose by itself: `ray` on a machine with two GPUs
(vLLM refuses Ray on a CPU)."""


def run_child(script: Path, job: Mapping[str, Any], folder: Path, name: str) -> None:
    """Runs `script` on `job`, whose `options` are vLLM's; what it printed follows a failure."""
    options = dict(job["options"])
    if EXECUTOR is not None:
        options["distributed_executor_backend"] = EXECUTOR
    path, log = folder / f"{name}.job", folder / f"{name}.log"
    path.write_text(json.dumps({**job, "options": options}))
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
        "VLLM_PLUGINS": "steer",
        "PYTHONPATH": os.pathsep.join(one for one in sys.path if "tests/support" in one),
    }
    with log.open("w") as printed:
        child = subprocess.Popen(
            [sys.executable, str(script), str(path)],
            env=environment,
            stdout=printed,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = child.wait(timeout=2 * LIVENESS_SECONDS)  # it may start vLLM twice
        finally:
            _end(child.pid)
            child.wait()
    assert code == 0, log.read_text()[-6000:]


def _end(session: int) -> None:
    """Ends what is left of a job's session: vLLM's processes outlive a parent that fails."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(session, signal.SIGKILL)
