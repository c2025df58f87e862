"""Latents of SAEs whose features compete: written by tiles, and the least that is active.

The k-th largest is found bit by bit, in memory, so that no program holds all latents.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.arithmetic import deviation_of, length_of
from steer.engines.vllm.static.kernel.names import (
    ENCODER_BIAS,
    ENCODER_MEASURE,
    EPSILON,
    LATENTS,
    READ,
    READS_CENTRED,
    READS_COSINE,
    SIGNED,
    TINY,
    K,
)


@triton.jit
def encode(x, entry, latents, part, parts, width, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes what the encoder `entry` makes of `x` into `latents`: the `part`-th of `parts` shares
    of it, tile by tile."""
    measure = tl.load(entry + ENCODER_MEASURE)
    if measure == READS_COSINE:
        x = x / tl.maximum(length_of(x), TINY)
    if measure == READS_CENTRED:
        x = x / (deviation_of(x, width, BLOCK) + EPSILON)
    read = tl.load(entry + READ).to(tl.pointer_type(tl.float32))
    bias = tl.load(entry + ENCODER_BIAS).to(tl.pointer_type(tl.float32))
    count = tl.load(entry + LATENTS).to(tl.int32)
    signed = tl.load(entry + SIGNED) != 0
    columns = tl.arange(0, BLOCK)
    for first in range(part * TILE, count, parts * TILE):
        rows = first + tl.arange(0, TILE)
        inside = rows < count
        tile = tl.load(
            read + rows[:, None].to(tl.int64) * width + columns[None, :],
            mask=inside[:, None] & (columns < width)[None, :],
            other=0.0,
        )
        value = tl.sum(tile * x[None, :], axis=1) + tl.load(bias + rows, mask=inside, other=0.0)
        value = tl.where(signed, tl.abs(value), tl.where(value > 0.0, value, 0.0))
        tl.store(latents + rows, value, mask=inside)


@triton.jit
def _latent_bits(latents, first, count, SPAN: tl.constexpr):
    """Latents from `first` on as integers, which have the order of numbers that are not negative;
    0 behind the last. Other programs wrote them, so they are read past the nearest cache."""
    places = first + tl.arange(0, SPAN)
    found = tl.load(latents + places, mask=places < count, other=0.0, cache_modifier=".cg")
    return found.to(tl.int32, bitcast=True)


@triton.jit
def _at_least(latents, count, bound, SPAN: tl.constexpr):
    """How many of the latents are `bound` or more."""
    found = tl.zeros((SPAN,), tl.int32)
    for first in range(0, count, SPAN):
        found += (_latent_bits(latents, first, count, SPAN) >= bound).to(tl.int32)
    return tl.sum(found, axis=0)


@triton.jit
def _largest_below(latents, count, bound, SPAN: tl.constexpr):
    """The largest of the latents that are less than `bound`; 0 where none is."""
    found = tl.zeros((SPAN,), tl.int32)
    for first in range(0, count, SPAN):
        bits = _latent_bits(latents, first, count, SPAN)
        found = tl.maximum(found, tl.where(bits < bound, bits, 0))
    return tl.max(found, axis=0)


@triton.jit
def least_active(entry, latents, SPAN: tl.constexpr):
    """`TopKEncoder.least_active` of the encoder `entry`, whose `latents` are there."""
    count = tl.load(entry + LATENTS).to(tl.int32)
    k = tl.load(entry + K).to(tl.int32)
    cutoff = tl.full((), 0.0, tl.float32)
    if k < count:
        # The k-th largest, a bit after the other: the largest number that k latents reach.
        kth = tl.full((), 0, tl.int32)
        for n in range(31):
            candidate = kth | (1 << (30 - n))
            enough = _at_least(latents, count, candidate, SPAN) >= k
            kth = tl.where(enough, candidate, kth)
        following = _largest_below(latents, count, kth, SPAN)
        following = tl.where(_at_least(latents, count, kth, SPAN) > k, kth, following)
        cutoff = 0.5 * (kth.to(tl.float32, bitcast=True) + following.to(tl.float32, bitcast=True))
    return cutoff
