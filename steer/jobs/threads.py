"""How many threads torch uses for the arithmetic of one thread of Python."""

from __future__ import annotations

import threading

import torch


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
