"""One token's latents, encoded by several programs."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.blocks import after_block, factor_of
from steer.engines.vllm.static.kernel.latents import encode
from steer.engines.vllm.static.kernel.names import (
    ALL,
    BLOCK_FIELDS,
    ENCODER,
    ENCODER_FIELDS,
    PASSES,
    RANKS,
)
from steer.engines.vllm.static.kernel.stream import load_stream


@triton.jit
def encode_together(
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
        is_first = (mine == 0) & ((here & open_now & ALL) != 0)
        place = tl.where(is_first, n, place)
        mine = tl.where(is_first, here, mine)
    acting = mine & open_now & ALL
    if (gates_here == 0) & (((mine >> RANKS) & acting) != 0):
        x = load_stream(hidden_row, residual_row, ((streams >> place) & 1) != 0, inside, SPLIT)
        nothing = tl.full((), float("-inf"), tl.float32)
        for number in range(PASSES):
            if (((acting >> number) & 1) != 0) & (encoded == 0):
                block = blocks + ((first_point + place) * PASSES + number) * BLOCK_FIELDS
                if ((mine >> (RANKS + number)) & 1) != 0:
                    entry = encoders + tl.load(block + ENCODER) * ENCODER_FIELDS
                    encode(x, entry, latents, part, parts, width, TILE, BLOCK)
                    encoded = tl.full((), 1, tl.int32)
                else:
                    x = after_block(
                        x,
                        nothing,
                        factor_of(marks, factors, number),
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
