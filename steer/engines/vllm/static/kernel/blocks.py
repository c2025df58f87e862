"""One block of edits on a row: all of them see the same state, and act at once."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.arithmetic import deviation_of, length_of, load_row
from steer.engines.vllm.static.kernel.laws import (
    activation_of,
    channel_changes,
    coefficient_of,
    length_in_plane,
)
from steer.engines.vllm.static.kernel.names import (
    CHANNELS,
    CONSTANT,
    COUNT,
    FIRST,
    FLAGS,
    KEPT,
    LAW_STRIDE,
    MEASURE,
    NEEDS_DEVIATION,
    NEEDS_NORM,
    NEEDS_PLANE,
    ONLY_ACTIVE,
    PRESERVES,
    RAMPED,
    READS_CENTRED,
    READS_COSINE,
    REPLACES,
    SIDE,
    SLOPE,
    TINY,
)


@triton.jit
def factor_of(marks, factors, number):
    """The factor by which what rule `number` does to a token is multiplied."""
    factor = tl.full((), 1.0, tl.float32)
    if (marks & RAMPED) != 0:
        factor = tl.load(factors + number)
    return factor


@triton.jit
def _part_way(before, after, factor):
    """`steer.edits.part_way`."""
    if factor != 1.0:
        after = before + factor * (after - before)
    return after


@triton.jit
def _kept_reading(kept, n, count, law, norm, deviation):
    """What the n-th of `count` edits has read where it reads, and the lengths that its law
    measures: those of the state there, if it measures that in its own length."""
    measure = tl.load(law + MEASURE)
    if (measure == READS_COSINE) | (measure == READS_CENTRED):
        norm = tl.load(kept + count)
        deviation = tl.load(kept + count + 1)
    return tl.load(kept + n), norm, deviation


@triton.jit
def after_block(
    before,
    cutoff,
    factor,
    block,
    latents,
    read,
    write,
    laws,
    following,
    constants,
    width,
    RANKING: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The row after one block, all of whose edits see `before`, or what `latents` keep of it from
    an earlier hook point; `cutoff` is the least absolute value that counts as active, `factor` how
    much of the change the token gets."""
    flags = tl.load(block + FLAGS)
    norm = tl.full((), 0.0, tl.float32)
    length = tl.full((), 0.0, tl.float32)
    if (flags & NEEDS_NORM) != 0:
        norm = length_of(before)
    deviation = tl.full((), 0.0, tl.float32)
    if (flags & NEEDS_DEVIATION) != 0:
        deviation = deviation_of(before, width, BLOCK)
    if (flags & NEEDS_PLANE) != 0:
        length = length_in_plane(before, block, read, laws, following, width, BLOCK)
    after = before
    if (flags & REPLACES) != 0:
        after = tl.zeros_like(before)
    constant = tl.load(block + CONSTANT)
    if constant != 0:
        after += load_row(constants, constant, width, width, BLOCK)
    channels = tl.load(block + CHANNELS)
    if channels != 0:
        after += channel_changes(before, channels, read, write, following, width, BLOCK)
    row = tl.load(block + FIRST)
    count = tl.load(block + COUNT)
    kept = tl.load(block + KEPT)
    for n in range(count):
        law = laws + row * LAW_STRIDE
        value = tl.full((), 0.0, tl.float32)
        edit_norm, edit_deviation = norm, deviation
        looks = (tl.load(law + SLOPE) != 0.0) | (tl.load(law + ONLY_ACTIVE) != 0.0)
        if looks & (kept == 0):
            product = tl.sum(load_row(read, row, width, width, BLOCK) * before, axis=0)
            value = activation_of(product, law, norm, deviation, cutoff)
        if RANKING:  # noqa: SIM102 -- known when the kernel is compiled
            if kept != 0:
                value, edit_norm, edit_deviation = _kept_reading(
                    latents + kept - 1, n, count, law, norm, deviation
                )
        c = coefficient_of(value, law, edit_norm, length, edit_deviation)
        after += c * load_row(write, row, width, width, BLOCK)
        row = tl.load(following + row)
    after = _part_way(before, after, factor)
    if (flags & PRESERVES) != 0:
        back = norm / tl.maximum(length_of(after), TINY)
        after = after * tl.where(back == float("inf"), 0.0, back)
    side = tl.load(block + SIDE)
    if side != 0:
        beyond = tl.sum(load_row(constants, side, width, width, BLOCK) * before, axis=0) > 0.0
        after = tl.where(beyond, after, before)
    return after
