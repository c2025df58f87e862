"""The row of the residual stream that a hook point edits, out of memory and back into it."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.arithmetic import runs_over


@triton.jit
def load_stream(hidden_row, residual_row, summed, inside, SPLIT: tl.constexpr):
    """The row that the edits of a hook point see: the sum of both halves, or `hidden` alone."""
    x = tl.load(hidden_row, mask=inside, other=0.0).to(tl.float32)
    if SPLIT:  # noqa: SIM102 -- known when the kernel is compiled, unlike `summed`
        if summed:
            x += tl.load(residual_row, mask=inside, other=0.0).to(tl.float32)
    return x


@triton.jit
def as_stored(x, hidden_row, summed, SPLIT: tl.constexpr):
    """`x` as `hidden` holds it, where it is no sum."""
    kept = x.to(hidden_row.dtype.element_ty).to(tl.float32)
    if SPLIT:
        kept = tl.where(summed, x, kept)
    return kept


@triton.jit
def contained(x, before, lost):
    """`x`, or `before` where only the edits have driven it beyond all numbers, which is noted."""
    if runs_over(x):  # noqa: SIM102 -- the second is computed where the first is true
        if not runs_over(before):
            x = before
            tl.store(lost, 1)
    return x


@triton.jit
def write_back(x, before, hidden_row, residual_row, summed, inside, SPLIT: tl.constexpr):
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
