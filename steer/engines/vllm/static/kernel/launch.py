"""Launching the kernel: its arguments, and how many programs and warps it gets."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

from typing import Any

import triton
from torch import Tensor

from steer.engines.vllm.static.kernel.group import edit_tokens
from steer.engines.vllm.static.tables import StaticTables, StepBuffers
from steer.errors import EngineError

_FLOATS_PER_THREAD = 16
_NUMBERS_PER_THREAD = 64
"""Of an encoder, that a program has on their way together: what its bandwidth comes from."""
_MOST_PROGRAMS = 64
_MOST_WARPS = 16
_WARP = 32


def launch_shape(width: int) -> tuple[int, int, int]:
    """The block and the number of warps for rows of `width`, and how many rows of an encoder are
    multiplied together."""
    block = triton.next_power_of_2(width)
    warps = min(max(block // (_WARP * _FLOATS_PER_THREAD), 1), _MOST_WARPS)
    return block, warps, max(warps * _WARP * _NUMBERS_PER_THREAD // block, 1)


def edit_group(
    tables: StaticTables,
    buffers: StepBuffers,
    group: int,
    hidden: Tensor,
    residual: Tensor | None,
    streams: int,
) -> None:
    """Edits `hidden` and `residual` `[T, d]` in place, at the hook points of `group`.

    `streams` has a bit for each of these points: whether it is the sum of both halves, or `hidden`
    alone. Allocates nothing and looks at no data. Raises `EngineError` for tensors of another
    shape than the tables were made for.
    """
    bank = tables.bank(group)
    _check(bank.width, buffers, hidden, residual)
    start, end = tables.first_points[group : group + 2]
    block, warps, tile = launch_shape(bank.width)
    other = hidden if residual is None else residual
    arguments: tuple[Any, ...] = (
        hidden,
        other,
        hidden.stride(0),
        other.stride(0),
        buffers.tokens,
        buffers.factors,
        buffers.opened,
        buffers.held,
        buffers.values,
        buffers.lost,
        buffers.sizes,
        buffers.reached,
        buffers.epoch,
        tables.work,
        tables.group_work,
        tables.blocks,
        tables.readers,
        tables.gate_rows,
        bank.read,
        bank.write,
        bank.laws,
        bank.following,
        bank.constants,
        bank.gates,
        tables.encoders.table,
        buffers.latents,
        buffers.latents_at,
        buffers.arrived,
        group,
        start,
        end - start,
        streams,
        len(tables.points),
        tables.groups,
        buffers.batch_tokens,
        bank.width,
    )
    shape = {
        "SPLIT": residual is not None,
        "RANKING": len(buffers.latents) > 0,
        "TILE": tile,
        "BLOCK": block,
        "num_warps": warps,
    }
    parts = _programs_per_token(hidden.shape[0], buffers)
    edit_tokens[(hidden.shape[0], parts)](*arguments, **shape)


def _programs_per_token(tokens: int, buffers: StepBuffers) -> int:
    """Few tokens leave processors idle, which then encode together; those of tokens that rank
    nothing leave at once."""
    if not len(buffers.latents):
        return 1
    return min(max(buffers.programs // tokens, 1), _MOST_PROGRAMS)


def _check(width: int, buffers: StepBuffers, hidden: Tensor, residual: Tensor | None) -> None:
    for half in (hidden, residual):
        if half is None:
            continue
        fits = half.ndim == 2 and half.shape[1] == width and half.shape[0] <= buffers.batch_tokens
        if not fits or half.stride(1) != 1 or half.shape != hidden.shape:
            raise EngineError(
                f"a tap was shown halves of shape {[list(hidden.shape), list(half.shape)]} and "
                f"strides {half.stride()}; rows of width {width} are needed, at most "
                f"{buffers.batch_tokens} of them, each in one piece",
                code="unexpected_shape",
            )
