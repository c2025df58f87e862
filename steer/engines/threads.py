"""Which threads compute, and why it should be few.

On a CPU each thread that runs PyTorch's operations gets a pool of OpenMP workers, which lives as
long as the thread does. GNU's OpenMP lets workers wait for their next piece awake, unless it
manages more threads than there are processors: then all of them fall asleep after a moment, and
each of the thousand operations of a step has to wake them. A second pool that nobody uses any more
is enough. (SmolLM2 on two cores: a decode step took an eighth longer.)
"""

from __future__ import annotations

import contextvars
import threading
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

import torch

Result = TypeVar("Result")


def apart(work: Callable[[], Result]) -> Result:
    """What `work` returns or raises, run in a thread that ends with it and takes its pool along.

    For work before an engine starts: the pool of the engine's own thread is then the only one.
    """
    future: Future[Result] = Future()
    context = contextvars.copy_context()

    def run() -> None:
        try:
            future.set_result(context.run(work))
        except BaseException as error:
            future.set_exception(error)

    # A daemon: who interrupts the wait is not held up by what is still loading.
    threading.Thread(target=run, name="steer-apart", daemon=True).start()
    return future.result()


def bound_threads(count: int) -> None:
    """Bounds torch's threads for operations that the calling thread starts.

    The bound is the calling thread's own (OpenMP keeps it so), but torch also remembers the last
    one set, for threads that begin later. So a thread that ends at once sets that back.
    """
    before = torch.get_num_threads()
    if count >= before:
        return
    torch.set_num_threads(count)
    restoring = threading.Thread(target=torch.set_num_threads, args=(before,))
    restoring.start()
    restoring.join()
