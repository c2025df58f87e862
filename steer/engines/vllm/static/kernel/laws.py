"""`steer.laws` in Triton: what an edit reads, and how much of its direction it writes."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.arithmetic import load_row
from steer.engines.vllm.static.kernel.names import (
    BIAS,
    CEILING,
    COUNT,
    EPSILON,
    FIRST,
    FLOOR,
    INTERCEPT,
    LAW_STRIDE,
    MEASURE,
    ONLY_ACTIVE,
    READS_CENTRED,
    READS_COSINE,
    READS_SHARE,
    RELATIVE,
    SLOPE,
    THRESHOLD,
    TINY,
    TO_DEVIATION,
    TO_NORM,
    TO_PLANE,
)


@triton.jit
def activation_of(product, law, norm, deviation, cutoff):
    """`steer.laws.activations` of one edit, whose law is at `law`."""
    value = product
    measure = tl.load(law + MEASURE)
    if measure == READS_COSINE:
        value = value / tl.maximum(norm, TINY)
    if measure == READS_CENTRED:
        value = value / (deviation + EPSILON)
    value += tl.load(law + BIAS)
    active = (value > tl.load(law + THRESHOLD)) & ((tl.abs(value) < cutoff) == 0)
    return tl.where(active, value, 0.0)


@triton.jit
def coefficient_of(value, law, norm, length, deviation):
    """`steer.laws.coefficients` of one edit, whose law is at `law`."""
    share = value
    if tl.load(law + MEASURE) == READS_SHARE:
        share = value / tl.maximum(norm, TINY)
    c = tl.load(law + INTERCEPT) + tl.load(law + SLOPE) * share
    c = tl.maximum(c, tl.load(law + FLOOR), propagate_nan=tl.PropagateNan.ALL)
    c = tl.minimum(c, tl.load(law + CEILING), propagate_nan=tl.PropagateNan.ALL)
    c = tl.where((value != 0.0) | (tl.load(law + ONLY_ACTIVE) == 0.0), c, 0.0)
    relative = tl.load(law + RELATIVE)
    c = tl.where(relative == TO_NORM, c * norm, c)
    c = tl.where(relative == TO_DEVIATION, c * deviation, c)
    return tl.where(relative == TO_PLANE, c * length, c)


@triton.jit
def length_in_plane(x, block, read, laws, following, width, BLOCK: tl.constexpr):
    """The length of `x` in the plane that the edits of a block read (`squares_in_plane`)."""
    squares = tl.full((), 0.0, tl.float32)
    row = tl.load(block + FIRST)
    for _ in range(tl.load(block + COUNT)):
        if tl.load(laws + row * LAW_STRIDE + RELATIVE) != TO_PLANE:
            product = tl.sum(load_row(read, row, width, width, BLOCK) * x, axis=0)
            squares += product * product
        row = tl.load(following + row)
    return tl.sqrt_rn(squares)


@triton.jit
def channel_changes(x, row, read, write, following, width, BLOCK: tl.constexpr):
    """`steer.edits.channel_changes` by the channels that begin in `row`."""
    change = (
        load_row(write, row, width, width, BLOCK) + load_row(read, row, width, width, BLOCK) * x
    )
    bounds = tl.load(following + row)
    outside = x < load_row(read, bounds, width, width, BLOCK)
    outside |= x > load_row(write, bounds, width, width, BLOCK)
    return tl.where(outside, -0.0, change)
