"""The kernel: one program for a token, through the hook points of a group."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.names import (
    ALL,
    BLOCK_FIELDS,
    DECIDES,
    FOLLOWERS,
    FOLLOWS,
    HELD_GATES,
    PASSES,
    RANKS,
    ROW,
    SELECTED,
    SLOT,
    TOKEN_FIELDS,
    TOKEN_GATES,
)
from steer.engines.vllm.static.kernel.point import at_point
from steer.engines.vllm.static.kernel.together import encode_together


@triton.jit(
    do_not_specialize=["group", "first_point", "points", "streams", "n_points", "n_groups"],
)
def edit_tokens(
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
    slot = tl.load(tokens + first * TOKEN_FIELDS + SLOT)
    if slot == 0:
        return
    todo = tl.load(group_work + slot * n_groups + group)
    if (todo == 0) | ((part > 0) & (((todo >> RANKS) & ALL) == 0)):
        return
    marks = tl.load(tokens + first * TOKEN_FIELDS + SELECTED)
    held_here = (todo >> HELD_GATES) & ALL
    gates_here = ((todo >> TOKEN_GATES) & ALL) | held_here
    deciding = ((marks & DECIDES) != 0) & (held_here != 0)
    idle = (((tl.load(opened + first) & todo) | (gates_here & marks)) & ALL) == 0
    # A decision is needed by later tokens of the same request, whose programs may run before. So
    # where one is made, the program that makes it takes those tokens over.
    taken_over = ((marks & FOLLOWS) != 0) & (held_here != 0)
    if (idle & (deciding == 0)) | taken_over:
        return
    columns = tl.arange(0, BLOCK)
    encoded = tl.full((), 0, tl.int32)
    if RANKING:
        encoded, done = encode_together(
            hidden + first.to(tl.int64) * hidden_stride + columns,
            residual + first.to(tl.int64) * residual_stride + columns,
            columns < width,
            streams,
            marks,
            factors + first * PASSES,
            tl.load(opened + first),
            gates_here,
            first_point,
            points,
            work + slot * n_points,
            blocks + slot * n_points * PASSES * BLOCK_FIELDS,
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
    row = tl.load(tokens + first * TOKEN_FIELDS + ROW)
    decisions = tl.load(held + row)
    count = tl.full((), 1, tl.int32)
    if deciding:
        count += tl.load(tokens + first * TOKEN_FIELDS + FOLLOWERS)

    for step in range(count):
        token = first + step
        marks = tl.load(tokens + token * TOKEN_FIELDS + SELECTED)
        open_now = tl.load(opened + token)
        for place in range(points):
            point = first_point + place
            open_now, decisions, encoded = at_point(
                hidden + token.to(tl.int64) * hidden_stride + columns,
                residual + token.to(tl.int64) * residual_stride + columns,
                ((streams >> place) & 1) != 0,
                columns < width,
                marks,
                factors + token * PASSES,
                open_now,
                decisions,
                tl.load(work + slot * n_points + point),
                blocks + (slot * n_points + point) * PASSES * BLOCK_FIELDS,
                readers + (slot * n_points + point) * PASSES,
                blocks + slot * n_points * PASSES * BLOCK_FIELDS,
                gate_rows + slot * PASSES,
                values + row * PASSES,
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
