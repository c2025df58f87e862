"""Gates of a plan, decided by the row that they are shown."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import triton
import triton.language as tl

from steer.engines.vllm.static.kernel.arithmetic import length_of, load_row
from steer.engines.vllm.static.kernel.names import (
    ABOVE,
    BELOW,
    COSINE,
    GATE_BIAS,
    GATE_FIELDS,
    ONWARD,
    PASSES,
    TINY,
)


@triton.jit
def decide(
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
    """What is open, and the decisions of the request, after the gates `shown` have read `x`.

    An onward gate that was opened before, as `decisions` say, is open whatever this token has; of
    such a request a pass in a kernel has one token.
    """
    for number in range(PASSES):
        if ((shown >> number) & 1) != 0:
            gate = tl.load(gate_rows + number)
            law = gates + gate * GATE_FIELDS
            value = tl.sum(x * load_row(constants, gate, width, width, BLOCK), axis=0)
            if tl.load(law + COSINE) != 0.0:
                value = value / tl.maximum(length_of(x), TINY)
            value += tl.load(law + GATE_BIAS)
            bit = ((value > tl.load(law + ABOVE)) & (value < tl.load(law + BELOW))).to(tl.int32)
            if ((held_gates >> number) & 1) != 0:
                decisions = (decisions & ~(1 << number)) | (bit << number)
                tl.store(values + number, value)
            else:
                if tl.load(law + ONWARD) != 0.0:
                    before = (decisions >> number) & 1
                    if (bit != 0) & (before == 0):
                        tl.store(values + number, value)
                    bit = bit | before
                open_now = (open_now & ~(1 << number)) | (bit << number)
    return open_now, decisions
