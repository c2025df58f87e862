"""The states of dummy requests, for models whose mixers keep one (Mamba, linear attention, short
convolutions).

vLLM gives all its dummy requests the null block: there such a mixer writes no result at all, or
takes every request for the same one. In a proof each has a slot of its own, 1 and up, empty before
the pass and after it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np


def state_groups(runner: Any) -> dict[int, list[str]]:
    """The layers of each group of `runner`'s caches whose blocks are states, by its number."""
    from vllm.v1.kv_cache_interface import MambaSpec  # noqa: PLC0415

    groups = enumerate(runner.kv_cache_config.kv_cache_groups)
    return {n: one.layer_names for n, one in groups if isinstance(one.kv_cache_spec, MambaSpec)}


@contextmanager
def empty_states(runner: Any, requests: int) -> Iterator[None]:
    """The slots of so many dummy requests hold no state, before and after."""
    layers = [name for names in state_groups(runner).values() for name in names]
    _empty(runner, layers, requests)
    try:
        yield
    finally:
        _empty(runner, layers, requests)


@contextmanager
def own_blocks(runner: Any, requests: int) -> Iterator[None]:
    """The first `requests` rows of a V1 runner's block tables name a slot each; assumes that no
    request runs."""
    tables = [
        runner.input_batch.block_table[group].block_table.np for group in state_groups(runner)
    ]
    for table in tables:
        table[:requests] = np.arange(1, requests + 1)[:, None]
    try:
        yield
    finally:
        for table in tables:
            table[:requests] = 0


def _empty(runner: Any, layers: list[str], requests: int) -> None:
    if not layers:
        return
    modules = runner.vllm_config.compilation_config.static_forward_context
    for name in layers:
        for state in modules[name].kv_cache:
            state[1 : requests + 1] = 0
