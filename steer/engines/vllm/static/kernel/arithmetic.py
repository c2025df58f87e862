"""Rows and what is measured of them: lengths and deviations, in float32."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_row(start, row, stride, width, BLOCK: tl.constexpr):
    """Row number `row` of `[.., width]`, float32."""
    columns = tl.arange(0, BLOCK)
    row = tl.load(start + row.to(tl.int64) * stride + columns, mask=columns < width, other=0.0)
    return row.to(tl.float32)


@triton.jit
def length_of(x):
    return tl.sqrt_rn(tl.sum(x * x, axis=0))


@triton.jit
def deviation_of(x, width, BLOCK: tl.constexpr):
    """`steer.laws.deviation`."""
    columns = tl.arange(0, BLOCK)
    rest = tl.where(columns < width, x - tl.sum(x, axis=0) / width, 0.0)
    return tl.sqrt_rn(tl.sum(rest * rest, axis=0) / (width - 1))


@triton.jit
def runs_over(x):
    """Whether float32 cannot hold the norm of the row: infinite, or NaN."""
    return (length_of(x) < float("inf")) == 0
