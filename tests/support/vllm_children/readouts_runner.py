"""A crowd that reads, on an engine of several workers: `python readouts_runner.py JOB.json`.

A test's child process: vLLM spawns its engine core and its workers from here. It fails where a
number is not that of an offline capture on the same engine.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import psutil
import vllm_engine
from liveness import LIVENESS_SECONDS
from readout_crowd import assert_all_compared, assert_all_read, compared, crowd

from steer.engines.vllm.front.engine import VllmEngine


def assert_alone() -> None:
    """No process of vLLM's is left of an engine that was stopped."""
    children = psutil.Process().children(recursive=True)
    theirs = [one for one in children if not _is_zombie(one) and not _tracks_resources(one)]
    psutil.wait_procs(theirs, timeout=LIVENESS_SECONDS)  # they were told to end
    assert not [one for one in theirs if one.is_running() and not _is_zombie(one)]


def _is_zombie(process: psutil.Process) -> bool:
    try:
        return bool(process.status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def _tracks_resources(process: psutil.Process) -> bool:
    """Whether this is Python's own, which ends with its parent."""
    try:
        return "resource_tracker" in " ".join(process.cmdline())
    except (psutil.NoSuchProcess, psutil.ZombieProcess):
        return False


def main(path: Path) -> None:
    job = json.loads(path.read_text())
    with VllmEngine.load(registry=job["registry"], **job["options"]) as engine:
        asked = crowd(engine, 30)
        assert_all_read(engine, asked, engine.complete([one.request for one in asked]))
        assert set(engine.capabilities.readouts) == {*job["readouts"]}
        if "kl" in job["readouts"]:
            steered = compared(engine, crowd(engine, 12))
            assert_all_compared(engine, steered, engine.complete(steered))
    assert_alone()


if __name__ == "__main__":
    assert vllm_engine.ENVIRONMENT
    main(Path(sys.argv[1]))
