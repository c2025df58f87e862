"""The Triton form: one launch per group of hook points, a program per token, static tables.

A program first looks up whether its token has anything to do in this group, and leaves at once if
not: two loads for an unsteered token. Otherwise it runs through the hook points of the group, the
gates and blocks of its own plan alone, with the row of the stream in registers. So the cost of a
token is that of its own edits, whatever the number of plans around it.

The form follows `steer.batch.step.Step` and `steer.edits`; dot products, norms and sums are
float32, and the row is cast once per hook point. Launches are captured by CUDA graphs: they read
and write static buffers alone, and depend on no data in Python.

Importing this module needs Triton; nothing else in the library does.
"""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from steer import edits
from steer.batch.tables import MAX_RULES
from steer.engines.vllm.static import encoders as static_encoders
from steer.engines.vllm.static import rows as static_rows
from steer.engines.vllm.static import tables as static_tables
from steer.engines.vllm.static.tables import StaticTables, StepBuffers
from steer.errors import EngineError

_PASSES = tl.constexpr(MAX_RULES)
_ALL = tl.constexpr((1 << MAX_RULES) - 1)
_TOKEN_GATES = tl.constexpr(static_tables.TOKEN_GATES)
_HELD_GATES = tl.constexpr(static_tables.HELD_GATES)
_RANKS = tl.constexpr(static_tables.RANKS)
_BLOCK_FIELDS = tl.constexpr(static_rows.BLOCK_FIELDS)
_FIRST = tl.constexpr(static_rows.FIRST)
_COUNT = tl.constexpr(static_rows.COUNT)
_CONSTANT = tl.constexpr(static_rows.CONSTANT)
_FLAGS = tl.constexpr(static_rows.FLAGS)
_REPLACES = tl.constexpr(static_rows.REPLACES)
_PRESERVES = tl.constexpr(static_rows.PRESERVES)
_NEEDS_NORM = tl.constexpr(static_rows.NEEDS_NORM)
_NEEDS_PLANE = tl.constexpr(static_rows.NEEDS_PLANE)
_NEEDS_DEVIATION = tl.constexpr(static_rows.NEEDS_DEVIATION)
_CHANNELS = tl.constexpr(static_rows.CHANNELS)
_SIDE = tl.constexpr(static_rows.SIDE)
_ENCODER = tl.constexpr(static_rows.ENCODER)
_KEPT = tl.constexpr(static_rows.KEPT)
_ENCODER_FIELDS = tl.constexpr(static_encoders.ENCODER_FIELDS)
_READ = tl.constexpr(static_encoders.READ)
_ENCODER_BIAS = tl.constexpr(static_encoders.BIAS)
_LATENTS = tl.constexpr(static_encoders.LATENTS)
_K = tl.constexpr(static_encoders.K)
_ENCODER_MEASURE = tl.constexpr(static_encoders.MEASURE)
_SIGNED = tl.constexpr(static_encoders.SIGNED)
_GATE_FIELDS = tl.constexpr(static_rows.GATE_FIELDS)
_ABOVE = tl.constexpr(static_rows.ABOVE)
_BELOW = tl.constexpr(static_rows.BELOW)
_MEASURE = tl.constexpr(edits.MEASURE)
_READS_COSINE = tl.constexpr(edits.COSINE)
_READS_CENTRED = tl.constexpr(edits.CENTRED)
_READS_SHARE = tl.constexpr(edits.SHARE)
_ONLY_ACTIVE = tl.constexpr(edits.ONLY_ACTIVE)
_EPSILON = tl.constexpr(edits.EPSILON)
_COSINE = tl.constexpr(static_rows.COSINE)
_GATE_BIAS = tl.constexpr(static_rows.GATE_BIAS)
_TOKEN_FIELDS = tl.constexpr(static_tables.TOKEN_FIELDS)
_SLOT = tl.constexpr(static_tables.SLOT)
_ROW = tl.constexpr(static_tables.ROW)
_SELECTED = tl.constexpr(static_tables.SELECTED)
_FOLLOWERS = tl.constexpr(static_tables.FOLLOWERS)
_DECIDES = tl.constexpr(static_tables.DECIDES)
_FOLLOWS = tl.constexpr(static_tables.FOLLOWS)
_MEASURED = tl.constexpr(static_tables.MEASURED)
_RAMPED = tl.constexpr(static_tables.RAMPED)
_LAW_STRIDE = tl.constexpr(static_rows.LAW_STRIDE)
_BIAS = tl.constexpr(edits.BIAS)
_THRESHOLD = tl.constexpr(edits.THRESHOLD)
_INTERCEPT = tl.constexpr(edits.INTERCEPT)
_SLOPE = tl.constexpr(edits.SLOPE)
_FLOOR = tl.constexpr(edits.FLOOR)
_CEILING = tl.constexpr(edits.CEILING)
_RELATIVE = tl.constexpr(edits.RELATIVE)
_TO_NORM = tl.constexpr(edits.TO_NORM)
_TO_PLANE = tl.constexpr(edits.TO_PLANE)
_TO_DEVIATION = tl.constexpr(edits.TO_DEVIATION)
_TINY = tl.constexpr(torch.finfo(torch.float32).tiny)

_FLOATS_PER_THREAD = 16
_NUMBERS_PER_THREAD = 64
"""Of an encoder, that a program has on their way together: what its bandwidth comes from."""
_MOST_PROGRAMS = 64
_MOST_WARPS = 16
_WARP = 32


@triton.jit
def _row(start, row, stride, width, BLOCK: tl.constexpr):
    """Row number `row` of `[.., width]`, float32."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(start + row.to(tl.int64) * stride + columns, mask=columns < width, other=0.0)
    return row.to(tl.float32)


@triton.jit
def _length(x):
    return tl.sqrt_rn(tl.sum(x * x, axis=0))


@triton.jit
def _deviation(x, width, BLOCK: tl.constexpr):
    """`steer.edits.deviation`."""
    columns = tl.arange(0, BLOCK)
    rest = tl.where(columns < width, x - tl.sum(x, axis=0) / width, 0.0)
    return tl.sqrt_rn(tl.sum(rest * rest, axis=0) / (width - 1))


@triton.jit
def _activation(product, law, norm, deviation, cutoff):
    """`steer.edits.activations` of one edit, whose law is at `law`."""
    value = product
    measure = tl.load(law + _MEASURE)
    if measure == _READS_COSINE:
        value = value / tl.maximum(norm, _TINY)
    if measure == _READS_CENTRED:
        value = value / (deviation + _EPSILON)
    value += tl.load(law + _BIAS)
    active = (value > tl.load(law + _THRESHOLD)) & ((tl.abs(value) < cutoff) == 0)
    return tl.where(active, value, 0.0)


@triton.jit
def _coefficient(value, law, norm, length, deviation):
    """`steer.edits.coefficients` of one edit, whose law is at `law`."""
    share = value
    if tl.load(law + _MEASURE) == _READS_SHARE:
        share = value / tl.maximum(norm, _TINY)
    c = tl.load(law + _INTERCEPT) + tl.load(law + _SLOPE) * share
    c = tl.maximum(c, tl.load(law + _FLOOR), propagate_nan=tl.PropagateNan.ALL)
    c = tl.minimum(c, tl.load(law + _CEILING), propagate_nan=tl.PropagateNan.ALL)
    c = tl.where((value != 0.0) | (tl.load(law + _ONLY_ACTIVE) == 0.0), c, 0.0)
    relative = tl.load(law + _RELATIVE)
    c = tl.where(relative == _TO_NORM, c * norm, c)
    c = tl.where(relative == _TO_DEVIATION, c * deviation, c)
    return tl.where(relative == _TO_PLANE, c * length, c)


@triton.jit
def _length_in_plane(x, block, read, laws, following, width, BLOCK: tl.constexpr):
    """The length of `x` in the plane that the edits of a block read (`squares_in_plane`)."""
    squares = tl.full((), 0.0, tl.float32)
    row = tl.load(block + _FIRST)
    for _ in range(tl.load(block + _COUNT)):
        if tl.load(laws + row * _LAW_STRIDE + _RELATIVE) != _TO_PLANE:
            product = tl.sum(_row(read, row, width, width, BLOCK) * x, axis=0)
            squares += product * product
        row = tl.load(following + row)
    return tl.sqrt_rn(squares)


@triton.jit
def _channel_changes(x, row, read, write, following, width, BLOCK: tl.constexpr):
    """`steer.edits.channel_changes` by the channels that begin in `row`."""
    change = _row(write, row, width, width, BLOCK) + _row(read, row, width, width, BLOCK) * x
    bounds = tl.load(following + row)
    outside = x < _row(read, bounds, width, width, BLOCK)
    outside |= x > _row(write, bounds, width, width, BLOCK)
    return tl.where(outside, -0.0, change)


@triton.jit
def _encode(x, entry, latents, part, parts, width, TILE: tl.constexpr, BLOCK: tl.constexpr):
    """Writes what the encoder `entry` makes of `x` into `latents`: the `part`-th of `parts` shares
    of it, tile by tile."""
    measure = tl.load(entry + _ENCODER_MEASURE)
    if measure == _READS_COSINE:
        x = x / tl.maximum(_length(x), _TINY)
    if measure == _READS_CENTRED:
        x = x / (_deviation(x, width, BLOCK) + _EPSILON)
    read = tl.load(entry + _READ).to(tl.pointer_type(tl.float32))
    bias = tl.load(entry + _ENCODER_BIAS).to(tl.pointer_type(tl.float32))
    count = tl.load(entry + _LATENTS).to(tl.int32)
    signed = tl.load(entry + _SIGNED) != 0
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
def _least_active(entry, latents, SPAN: tl.constexpr):
    """`TopKEncoder.least_active` of the encoder `entry`, whose `latents` are there."""
    count = tl.load(entry + _LATENTS).to(tl.int32)
    k = tl.load(entry + _K).to(tl.int32)
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
    number = tl.load(block + _ENCODER)
    if number != 0:
        entry = encoders + number * _ENCODER_FIELDS
        _encode(x, entry, latents, 0, 1, width, TILE, BLOCK)
        tl.debug_barrier()
        cutoff = _least_active(entry, latents, TILE * BLOCK)
        tl.debug_barrier()  # before another encoder writes there
    norm, deviation = _length(x), _deviation(x, width, BLOCK)
    kept = latents + tl.load(block + _KEPT) - 1
    row = tl.load(block + _FIRST)
    count = tl.load(block + _COUNT)
    for n in range(count):
        product = tl.sum(_row(read, row, width, width, BLOCK) * x, axis=0)
        value = _activation(product, laws + row * _LAW_STRIDE, norm, deviation, cutoff)
        tl.store(kept + n, value)
        row = tl.load(following + row)
    tl.store(kept + count, norm)
    tl.store(kept + count + 1, deviation)
    tl.debug_barrier()  # a later point of the group may be written by them


@triton.jit
def _kept_reading(kept, n, count, law, norm, deviation):
    """What the n-th of `count` edits has read where it reads, and the lengths that its law
    measures: those of the state there, if it measures that in its own length."""
    measure = tl.load(law + _MEASURE)
    if (measure == _READS_COSINE) | (measure == _READS_CENTRED):
        norm = tl.load(kept + count)
        deviation = tl.load(kept + count + 1)
    return tl.load(kept + n), norm, deviation


@triton.jit
def _factor(marks, factors, number):
    """The factor by which what rule `number` does to a token is multiplied."""
    factor = tl.full((), 1.0, tl.float32)
    if (marks & _RAMPED) != 0:
        factor = tl.load(factors + number)
    return factor


@triton.jit
def _part_way(before, after, factor):
    """`steer.edits.part_way`."""
    if factor != 1.0:
        after = before + factor * (after - before)
    return after


@triton.jit
def _after_block(
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
    flags = tl.load(block + _FLAGS)
    norm = tl.full((), 0.0, tl.float32)
    length = tl.full((), 0.0, tl.float32)
    if (flags & _NEEDS_NORM) != 0:
        norm = _length(before)
    deviation = tl.full((), 0.0, tl.float32)
    if (flags & _NEEDS_DEVIATION) != 0:
        deviation = _deviation(before, width, BLOCK)
    if (flags & _NEEDS_PLANE) != 0:
        length = _length_in_plane(before, block, read, laws, following, width, BLOCK)
    after = before
    if (flags & _REPLACES) != 0:
        after = tl.zeros_like(before)
    constant = tl.load(block + _CONSTANT)
    if constant != 0:
        after += _row(constants, constant, width, width, BLOCK)
    channels = tl.load(block + _CHANNELS)
    if channels != 0:
        after += _channel_changes(before, channels, read, write, following, width, BLOCK)
    row = tl.load(block + _FIRST)
    count = tl.load(block + _COUNT)
    kept = tl.load(block + _KEPT)
    for n in range(count):
        law = laws + row * _LAW_STRIDE
        value = tl.full((), 0.0, tl.float32)
        edit_norm, edit_deviation = norm, deviation
        looks = (tl.load(law + _SLOPE) != 0.0) | (tl.load(law + _ONLY_ACTIVE) != 0.0)
        if looks & (kept == 0):
            product = tl.sum(_row(read, row, width, width, BLOCK) * before, axis=0)
            value = _activation(product, law, norm, deviation, cutoff)
        if RANKING:  # noqa: SIM102 -- known when the kernel is compiled
            if kept != 0:
                value, edit_norm, edit_deviation = _kept_reading(
                    latents + kept - 1, n, count, law, norm, deviation
                )
        c = _coefficient(value, law, edit_norm, length, edit_deviation)
        after += c * _row(write, row, width, width, BLOCK)
        row = tl.load(following + row)
    after = _part_way(before, after, factor)
    if (flags & _PRESERVES) != 0:
        factor = norm / tl.maximum(_length(after), _TINY)
        after = after * tl.where(factor == float("inf"), 0.0, factor)
    side = tl.load(block + _SIDE)
    if side != 0:
        beyond = tl.sum(_row(constants, side, width, width, BLOCK) * before, axis=0) > 0.0
        after = tl.where(beyond, after, before)
    return after


@triton.jit
def _decided(
    x,
    shown,
    held_gates,
    open_now,
    decisions,
    gate_rows,
    gates,
    constants,
    values,
    width,
    BLOCK: tl.constexpr,
):
    """What is open, and the decisions of the request, after the gates `shown` have read `x`."""
    for number in range(_PASSES):
        if ((shown >> number) & 1) != 0:
            gate = tl.load(gate_rows + number)
            law = gates + gate * _GATE_FIELDS
            value = tl.sum(x * _row(constants, gate, width, width, BLOCK), axis=0)
            if tl.load(law + _COSINE) != 0.0:
                value = value / tl.maximum(_length(x), _TINY)
            value += tl.load(law + _GATE_BIAS)
            bit = ((value > tl.load(law + _ABOVE)) & (value < tl.load(law + _BELOW))).to(tl.int32)
            if ((held_gates >> number) & 1) != 0:
                decisions = (decisions & ~(1 << number)) | (bit << number)
                tl.store(values + number, value)
            else:
                open_now = (open_now & ~(1 << number)) | (bit << number)
    return open_now, decisions


@triton.jit
def _stream(hidden_row, residual_row, summed, inside, SPLIT: tl.constexpr):
    """The row that the edits of a hook point see: the sum of both halves, or `hidden` alone."""
    x = tl.load(hidden_row, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:  # noqa: SIM102 -- known when the kernel is compiled, unlike `summed`
        if summed:
            x += tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def _stored(x, hidden_row, summed, SPLIT: tl.constexpr):
    """`x` as `hidden` holds it, where it is no sum."""
    kept = x.to(hidden_row.dtype.element_ty).to(tl.float32)
    if SPLIT:
        kept = tl.where(summed, x, kept)
    return kept


@triton.jit
def _runs_over(x):
    """Whether float32 cannot hold the norm of the row: infinite, or NaN."""
    return (_length(x) < float("inf")) == 0


@triton.jit
def _contained(x, before, lost):
    """`x`, or `before` where only the edits have driven it beyond all numbers, which is noted."""
    if _runs_over(x):  # noqa: SIM102 -- the second is computed where the first is true
        if not _runs_over(before):
            x = before
            tl.store(lost, 1)
    return x


@triton.jit
def _write_back(x, before, hidden_row, residual_row, summed, inside, SPLIT: tl.constexpr):
    """Puts the row `x` in the place of `before`: a sum changes by the difference in `residual`."""
    if SPLIT:
        if summed:
            half = tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
            tl.store(residual_row, half - (before - x), mask=inside)
        else:
            tl.store(hidden_row, x, mask=inside)
    else:
        tl.store(hidden_row, x, mask=inside)
    # Threads may hold other columns when the next hook point loads the row.
    tl.debug_barrier()


@triton.jit
def _read_for_later(
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
    for number in range(_PASSES):
        point = tl.load(readers + number)
        if (point != 0) & (((open_now >> number) & 1) != 0):
            x = _stream(hidden_row, residual_row, summed, inside, SPLIT)
            block = slot_blocks + ((point - 1) * _PASSES + number) * _BLOCK_FIELDS
            _readings(x, block, encoders, latents, read, laws, following, width, TILE, BLOCK)
            encoded = tl.full((), 0, tl.int32)
    return encoded


@triton.jit
def _at_point(
    hidden_row,
    residual_row,
    summed,
    inside,
    marks,
    factors,
    open_now,
    decisions,
    mine,
    blocks,
    readers,
    slot_blocks,
    gate_rows,
    values,
    lost,
    size,
    read,
    write,
    laws,
    following,
    constants,
    gates,
    encoders,
    latents,
    encoded,
    width,
    SPLIT: tl.constexpr,
    RANKING: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One hook point for one token: what is open after it, the decisions of its request, and
    whether its `latents` are still to be used, which they are by the first block that ranks any.

    `mine` are the bits of `work` of the token's plan here. Gates read before any block edits;
    `readers` among all `slot_blocks` of the plan, which edit behind this point, read after that.
    """
    held_gates = (mine >> _HELD_GATES) & _ALL
    shown = (mine >> _TOKEN_GATES) & marks & _ALL
    if (marks & _DECIDES) != 0:
        shown |= held_gates
    open_now = (open_now & ~held_gates) | (decisions & held_gates & marks)
    if (shown | (mine & open_now & _ALL)) != 0:
        x = _stream(hidden_row, residual_row, summed, inside, SPLIT)
        if shown != 0:
            open_now, decisions = _decided(
                x,
                shown,
                held_gates,
                open_now,
                decisions,
                gate_rows,
                gates,
                constants,
                values,
                width,
                BLOCK,
            )
            open_now = (open_now & ~held_gates) | (decisions & held_gates & marks)
        acting = mine & open_now & _ALL
        if acting != 0:
            for number in range(_PASSES):
                if ((acting >> number) & 1) != 0:
                    block = blocks + number * _BLOCK_FIELDS
                    cutoff = tl.full((), float("-inf"), tl.float32)
                    if RANKING:  # noqa: SIM102 -- known when the kernel is compiled
                        if ((mine >> (_RANKS + number)) & 1) != 0:
                            entry = encoders + tl.load(block + _ENCODER) * _ENCODER_FIELDS
                            if encoded == 0:
                                _encode(x, entry, latents, 0, 1, width, TILE, BLOCK)
                                tl.debug_barrier()
                            cutoff = _least_active(entry, latents, TILE * BLOCK)
                            encoded = tl.full((), 0, tl.int32)
                            tl.debug_barrier()  # before another encoder writes there
                    x = _after_block(
                        x,
                        cutoff,
                        _factor(marks, factors, number),
                        block,
                        latents,
                        read,
                        write,
                        laws,
                        following,
                        constants,
                        width,
                        RANKING,
                        BLOCK,
                    )
            # Loaded again, so that it needs no registers meanwhile.
            before = _stream(hidden_row, residual_row, summed, inside, SPLIT)
            x = _stored(x, hidden_row, summed, SPLIT)
            x = _contained(x, before, lost)
            if (marks & _MEASURED) != 0:
                tl.store(size, _length(x - before) / tl.maximum(_length(before), _TINY))
            _write_back(x, before, hidden_row, residual_row, summed, inside, SPLIT)
    if RANKING:
        encoded = _read_for_later(
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
            SPLIT,
            TILE,
            BLOCK,
        )
    return open_now, decisions, encoded


@triton.jit
def _encode_together(
    hidden_row,
    residual_row,
    inside,
    streams,
    marks,
    factors,
    open_now,
    gates_here,
    first_point,
    points,
    work,
    blocks,
    read,
    write,
    laws,
    following,
    constants,
    encoders,
    latents,
    arrived,
    width,
    SPLIT: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The share of this program in the latents that a token's first edit in the group ranks:
    whether they are all there, and whether this program is done.

    No program waits for another: whoever comes last goes on with the token, and nobody has
    written to its row before. So nothing of this group may come before that edit but other rules
    at its own point, which each program computes for itself.
    """
    part, parts = tl.program_id(1), tl.num_programs(1)
    encoded = tl.full((), 0, tl.int32)
    done = (part > 0).to(tl.int32)
    place = tl.full((), 0, tl.int32)
    mine = tl.full((), 0, tl.int32)
    for n in range(points):
        here = tl.load(work + first_point + n)
        is_first = (mine == 0) & ((here & open_now & _ALL) != 0)
        place = tl.where(is_first, n, place)
        mine = tl.where(is_first, here, mine)
    acting = mine & open_now & _ALL
    if (gates_here == 0) & (((mine >> _RANKS) & acting) != 0):
        x = _stream(hidden_row, residual_row, ((streams >> place) & 1) != 0, inside, SPLIT)
        nothing = tl.full((), float("-inf"), tl.float32)
        for number in range(_PASSES):
            if (((acting >> number) & 1) != 0) & (encoded == 0):
                block = blocks + ((first_point + place) * _PASSES + number) * _BLOCK_FIELDS
                if ((mine >> (_RANKS + number)) & 1) != 0:
                    entry = encoders + tl.load(block + _ENCODER) * _ENCODER_FIELDS
                    _encode(x, entry, latents, part, parts, width, TILE, BLOCK)
                    encoded = tl.full((), 1, tl.int32)
                else:
                    x = _after_block(
                        x,
                        nothing,
                        _factor(marks, factors, number),
                        block,
                        latents,
                        read,
                        write,
                        laws,
                        following,
                        constants,
                        width,
                        True,
                        BLOCK,
                    )
        tl.debug_barrier()
        done = (tl.atomic_add(arrived, 1) < parts - 1).to(tl.int32)
        if done == 0:
            tl.store(arrived, 0)
    return encoded, done


@triton.jit(
    do_not_specialize=["group", "first_point", "points", "streams", "n_points", "n_groups"],
)
def _edit_group(
    hidden,
    residual,
    hidden_stride,
    residual_stride,
    tokens,
    factors,
    opened,
    held,
    values,
    lost,
    sizes,
    reached,
    epoch,
    work,
    group_work,
    blocks,
    readers,
    gate_rows,
    read,
    write,
    laws,
    following,
    constants,
    gates,
    encoders,
    latents,
    latents_at,
    arrived,
    group,
    first_point,
    points,
    streams,
    n_points,
    n_groups,
    batch_tokens,
    width,
    SPLIT: tl.constexpr,
    RANKING: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """The gates and blocks of one group, for the token of this program.

    `streams` has a bit for each point of the group: whether it is the sum of both halves, or
    `hidden` alone. `SPLIT` is whether there is a `residual` half at all. A token has several
    programs where `RANKING`, all but the first of which leave unless it ranks latents.
    """
    first, part = tl.program_id(0), tl.program_id(1)
    if (first == 0) & (part == 0):
        tl.store(reached + group, tl.load(epoch))
    slot = tl.load(tokens + first * _TOKEN_FIELDS + _SLOT)
    if slot == 0:
        return
    todo = tl.load(group_work + slot * n_groups + group)
    if (todo == 0) | ((part > 0) & (((todo >> _RANKS) & _ALL) == 0)):
        return
    marks = tl.load(tokens + first * _TOKEN_FIELDS + _SELECTED)
    held_here = (todo >> _HELD_GATES) & _ALL
    gates_here = ((todo >> _TOKEN_GATES) & _ALL) | held_here
    deciding = ((marks & _DECIDES) != 0) & (held_here != 0)
    idle = (((tl.load(opened + first) & todo) | (gates_here & marks)) & _ALL) == 0
    # A decision is needed by later tokens of the same request, whose programs may run before. So
    # where one is made, the program that makes it takes those tokens over.
    taken_over = ((marks & _FOLLOWS) != 0) & (held_here != 0)
    if (idle & (deciding == 0)) | taken_over:
        return
    columns = tl.arange(0, BLOCK)
    encoded = tl.full((), 0, tl.int32)
    if RANKING:
        encoded, done = _encode_together(
            hidden + first.to(tl.int64) * hidden_stride + columns,
            residual + first.to(tl.int64) * residual_stride + columns,
            columns < width,
            streams,
            marks,
            factors + first * _PASSES,
            tl.load(opened + first),
            gates_here,
            first_point,
            points,
            work + slot * n_points,
            blocks + slot * n_points * _PASSES * _BLOCK_FIELDS,
            read,
            write,
            laws,
            following,
            constants,
            encoders,
            latents + tl.load(latents_at + first),
            arrived + first,
            width,
            SPLIT,
            TILE,
            BLOCK,
        )
        if done != 0:
            return
    row = tl.load(tokens + first * _TOKEN_FIELDS + _ROW)
    decisions = tl.load(held + row)
    count = tl.full((), 1, tl.int32)
    if deciding:
        count += tl.load(tokens + first * _TOKEN_FIELDS + _FOLLOWERS)

    for step in range(count):
        token = first + step
        marks = tl.load(tokens + token * _TOKEN_FIELDS + _SELECTED)
        open_now = tl.load(opened + token)
        for place in range(points):
            point = first_point + place
            open_now, decisions, encoded = _at_point(
                hidden + token.to(tl.int64) * hidden_stride + columns,
                residual + token.to(tl.int64) * residual_stride + columns,
                ((streams >> place) & 1) != 0,
                columns < width,
                marks,
                factors + token * _PASSES,
                open_now,
                decisions,
                tl.load(work + slot * n_points + point),
                blocks + (slot * n_points + point) * _PASSES * _BLOCK_FIELDS,
                readers + (slot * n_points + point) * _PASSES,
                blocks + slot * n_points * _PASSES * _BLOCK_FIELDS,
                gate_rows + slot * _PASSES,
                values + row * _PASSES,
                lost + token,
                sizes + point * batch_tokens + token,
                read,
                write,
                laws,
                following,
                constants,
                gates,
                encoders,
                latents + tl.load(latents_at + token),
                encoded,
                width,
                SPLIT,
                RANKING,
                TILE,
                BLOCK,
            )
        if gates_here != 0:
            tl.store(opened + token, open_now)
    if deciding:
        tl.store(held + row, decisions)


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
    _edit_group[(hidden.shape[0], parts)](*arguments, **shape)


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
