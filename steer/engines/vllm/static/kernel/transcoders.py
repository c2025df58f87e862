"""What transcoders read at one hook point and write at another: kept between the two."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.arithmetic import deviation_of, length_of, load_row
from steer.engines.vllm.static.kernel.latents import encode, least_active
from steer.engines.vllm.static.kernel.laws import activation_of
from steer.engines.vllm.static.kernel.names import (
    BLOCK_FIELDS,
    COUNT,
    ENCODER,
    ENCODER_FIELDS,
    FIRST,
    KEPT,
    LAW_STRIDE,
    PASSES,
)
from steer.engines.vllm.static.kernel.stream import load_stream


@triton.jit
def _readings(
    x,
    block,
    encoders,
    latents,
    read,
    laws,
    following,
    width,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Keeps in `latents` what the edits of `block`, which writes elsewhere, read of `x`, and the
    lengths of `x` behind it. It may encode in the place of latents that are there."""
    cutoff = tl.full((), float("-inf"), tl.float32)
    number = tl.load(block + ENCODER)
    if number != 0:
        entry = encoders + number * ENCODER_FIELDS
        encode(x, entry, latents, 0, 1, width, TILE, BLOCK)
        tl.debug_barrier()
        cutoff = least_active(entry, latents, TILE * BLOCK)
        tl.debug_barrier()  # before another encoder writes there
    norm, deviation = length_of(x), deviation_of(x, width, BLOCK)
    kept = latents + tl.load(block + KEPT) - 1
    row = tl.load(block + FIRST)
    count = tl.load(block + COUNT)
    for n in range(count):
        product = tl.sum(load_row(read, row, width, width, BLOCK) * x, axis=0)
        value = activation_of(product, laws + row * LAW_STRIDE, norm, deviation, cutoff)
        tl.store(kept + n, value)
        row = tl.load(following + row)
    tl.store(kept + count, norm)
    tl.store(kept + count + 1, deviation)
    tl.debug_barrier()  # a later point of the group may be written by them


@triton.jit
def read_for_later(
    hidden_row,
    residual_row,
    summed,
    inside,
    open_now,
    readers,
    slot_blocks,
    encoders,
    latents,
    encoded,
    read,
    laws,
    following,
    width,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Lets the open blocks among `slot_blocks` that `readers` name read the row as it is now.
    Whether latents that were encoded before are still there."""
    for number in range(PASSES):
        point = tl.load(readers + number)
        if (point != 0) & (((open_now >> number) & 1) != 0):
            x = load_stream(hidden_row, residual_row, summed, inside, SPLIT)
            block = slot_blocks + ((point - 1) * PASSES + number) * BLOCK_FIELDS
            _readings(x, block, encoders, latents, read, laws, following, width, TILE, BLOCK)
            encoded = tl.full((), 0, tl.int32)
    return encoded
