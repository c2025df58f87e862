"""One hook point for one token: gates first, then the blocks that are open."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.arithmetic import length_of
from steer.engines.vllm.static.kernel.blocks import after_block, factor_of
from steer.engines.vllm.static.kernel.gates import decide
from steer.engines.vllm.static.kernel.latents import encode, least_active
from steer.engines.vllm.static.kernel.names import (
    ALL,
    BLOCK_FIELDS,
    DECIDES,
    ENCODER,
    ENCODER_FIELDS,
    HELD_GATES,
    MEASURED,
    PASSES,
    RANKS,
    TINY,
    TOKEN_GATES,
)
from steer.engines.vllm.static.kernel.stream import as_stored, contained, load_stream, write_back
from steer.engines.vllm.static.kernel.transcoders import read_for_later


@triton.jit
def at_point(
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
    held_gates = (mine >> HELD_GATES) & ALL
    shown = (mine >> TOKEN_GATES) & marks & ALL
    if (marks & DECIDES) != 0:
        shown |= held_gates
    open_now = (open_now & ~held_gates) | (decisions & held_gates & marks)
    if (shown | (mine & open_now & ALL)) != 0:
        x = load_stream(hidden_row, residual_row, summed, inside, SPLIT)
        if shown != 0:
            open_now, decisions = decide(
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
        acting = mine & open_now & ALL
        if acting != 0:
            for number in range(PASSES):
                if ((acting >> number) & 1) != 0:
                    block = blocks + number * BLOCK_FIELDS
                    cutoff = tl.full((), float("-inf"), tl.float32)
                    if RANKING:  # noqa: SIM102 -- known when the kernel is compiled
                        if ((mine >> (RANKS + number)) & 1) != 0:
                            entry = encoders + tl.load(block + ENCODER) * ENCODER_FIELDS
                            if encoded == 0:
                                encode(x, entry, latents, 0, 1, width, TILE, BLOCK)
                                tl.debug_barrier()
                            cutoff = least_active(entry, latents, TILE * BLOCK)
                            encoded = tl.full((), 0, tl.int32)
                            tl.debug_barrier()  # before another encoder writes there
                    x = after_block(
                        x,
                        cutoff,
                        factor_of(marks, factors, number),
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
            before = load_stream(hidden_row, residual_row, summed, inside, SPLIT)
            x = as_stored(x, hidden_row, summed, SPLIT)
            x = contained(x, before, lost)
            if (marks & MEASURED) != 0:
                tl.store(size, length_of(x - before) / tl.maximum(length_of(before), TINY))
            write_back(x, before, hidden_row, residual_row, summed, inside, SPLIT)
    if RANKING:
        encoded = read_for_later(
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
