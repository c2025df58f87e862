"""What dummy requests find in the cache: states for models whose mixers keep one (Mamba, linear
attention, short convolutions), and keys and values for attention to read.

vLLM gives all its dummy requests the null block: there such a mixer writes no result at all, or
takes every request for the same one. In a proof each has a slot of its own, 1 and up, empty before
the pass and after it.

Nor are a dummy request's keys and values written: its attention reads the null block alone, where
everything is zero, and gives the same whatever it is asked. So where that must show, the null block
holds numbers for a while.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from steer.model import INNER_SITES, ModelInfo

NULL_CONTEXT = 7
"""Tokens before a dummy request that its attention reads in the null block, where it can be told
how many; a block holds more."""


def reads_attention(model: ModelInfo) -> bool:
    """Whether a proof needs attention to give what it makes of its input: it has sites inside."""
    return any(INNER_SITES.get(site) == "attn_out" for site in model.sites)


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


@contextmanager
def filled_null_block(runner: Any) -> Iterator[None]:
    """The null block of every attention cache holds numbers, another for each key and value, and
    zeros again afterwards; assumes that no request runs."""
    blocks = list(_null_blocks(runner))
    generator = torch.Generator().manual_seed(0)
    for block in blocks:
        # Where numbers of eight bits are kept as bytes, low ones are small in every format.
        small = torch.rand(block.shape, generator=generator) * 2 - 1
        bytes_of_any = torch.randint(0, 64, block.shape, generator=generator)
        block.copy_((small if block.is_floating_point() else bytes_of_any).to(block.dtype))
    try:
        yield
    finally:
        for block in blocks:
            block.zero_()


def _null_blocks(runner: Any) -> Iterator[Tensor]:
    """The part of each attention cache that block 0 is; backends put the blocks in the first or the
    second dimension, and may cut them into several."""
    from vllm.v1.kv_cache_interface import AttentionSpec  # noqa: PLC0415

    config = runner.kv_cache_config
    modules = runner.vllm_config.compilation_config.static_forward_context
    for group in config.kv_cache_groups:
        specs = getattr(group.kv_cache_spec, "kv_cache_specs", None)
        for name in group.layer_names:
            spec = group.kv_cache_spec if specs is None else specs[name]
            if not isinstance(spec, AttentionSpec):
                continue
            cache = modules[name].kv_cache
            for one in [cache] if isinstance(cache, Tensor) else cache:
                place = next(n for n in (0, 1) if one.shape[n] % config.num_blocks == 0)
                yield one.narrow(place, 0, one.shape[place] // config.num_blocks)


def _empty(runner: Any, layers: list[str], requests: int) -> None:
    if not layers:
        return
    modules = runner.vllm_config.compilation_config.static_forward_context
    for name in layers:
        for state in modules[name].kv_cache:
            state[1 : requests + 1] = 0
