"""Where the GPU benchmarks compute: CUDA, or a CPU on which their logic is tried."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Protocol, TypeVar

import torch

F = TypeVar("F", bound=Callable[..., Any])


class NoDevice(RuntimeError):
    """The device that was asked for is not here; the message says what to do."""


class Device(Protocol):
    torch: torch.device

    def compiled(self, function: F) -> F:
        """`function`, through torch.compile."""

    def captured(self, work: Callable[[], object]) -> Callable[[], None]:
        """`work` as a graph that is replayed: the same kernels at the same addresses."""

    def seconds(self, work: Callable[[], object], times: int) -> float:
        """What one of so many runs takes, on the device's own clock."""

    def wait(self) -> None:
        """Until all that was launched is done. Raises `RuntimeError` where the device is lost."""

    def machine(self) -> dict[str, Any]:
        """What it is."""


class Cuda:
    """The first CUDA device."""

    def __init__(self) -> None:
        if not torch.cuda.is_available():
            raise NoDevice(
                f"torch {torch.__version__} sees no CUDA device here: run this on a host with an "
                "NVIDIA GPU, its driver and a CUDA build of torch; --device cpu --small tries the "
                "scripts without one, and measures nothing"
            )
        self.torch = torch.device("cuda")

    def compiled(self, function: F) -> F:
        made: F = torch.compile(function, dynamic=True, fullgraph=True)  # type: ignore[assignment]
        return made

    def captured(self, work: Callable[[], object]) -> Callable[[], None]:
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):  # compiles, and chooses algorithms, outside the graph
                work()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            work()
        replay: Callable[[], None] = graph.replay
        return replay

    def seconds(self, work: Callable[[], object], times: int) -> float:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        begin.record()
        for _ in range(times):
            work()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) / 1e3 / times

    def wait(self) -> None:
        torch.cuda.synchronize()

    def machine(self) -> dict[str, Any]:
        found = torch.cuda.get_device_properties(0)
        return {
            "gpu": found.name,
            "gpu_memory_gib": round(found.total_memory / 2**30, 1),
            "sm": f"{found.major}.{found.minor}",
            "multiprocessors": found.multi_processor_count,
            "cuda": torch.version.cuda,
        }


class Host:
    """A CPU: nothing is compiled or captured, and times mean nothing."""

    torch = torch.device("cpu")

    def compiled(self, function: F) -> F:
        return function

    def captured(self, work: Callable[[], object]) -> Callable[[], None]:
        return lambda: (work(), None)[1]

    def seconds(self, work: Callable[[], object], times: int) -> float:
        started = time.perf_counter()
        for _ in range(times):
            work()
        return (time.perf_counter() - started) / times

    def wait(self) -> None:
        pass

    def machine(self) -> dict[str, Any]:
        return {"gpu": "none: tried on a CPU"}


def device(name: str) -> Device:
    """`cuda` or `cpu`. Raises `NoDevice`."""
    if name not in ("cuda", "cpu"):
        raise NoDevice(f"the device is {name!r}: choose cuda, or cpu to try the scripts")
    return Cuda() if name == "cuda" else Host()
