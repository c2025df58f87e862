"""The numbers that the kernel shares with those who fill its tables, as Triton takes them."""

# mypy: disable-error-code="import-not-found, no-untyped-def, untyped-decorator, no-untyped-call"
# Triton reads the source of its kernels: what they take are its own pointers and scalars.

from __future__ import annotations

import torch
import triton.language as tl

from steer import laws
from steer.batch.tables import MAX_RULES
from steer.engines.vllm.static import encoders as static_encoders
from steer.engines.vllm.static import rows as static_rows
from steer.engines.vllm.static import tables as static_tables

PASSES = tl.constexpr(MAX_RULES)
ALL = tl.constexpr((1 << MAX_RULES) - 1)
TOKEN_GATES = tl.constexpr(static_tables.TOKEN_GATES)
HELD_GATES = tl.constexpr(static_tables.HELD_GATES)
RANKS = tl.constexpr(static_tables.RANKS)
BLOCK_FIELDS = tl.constexpr(static_rows.BLOCK_FIELDS)
FIRST = tl.constexpr(static_rows.FIRST)
COUNT = tl.constexpr(static_rows.COUNT)
CONSTANT = tl.constexpr(static_rows.CONSTANT)
FLAGS = tl.constexpr(static_rows.FLAGS)
REPLACES = tl.constexpr(static_rows.REPLACES)
PRESERVES = tl.constexpr(static_rows.PRESERVES)
NEEDS_NORM = tl.constexpr(static_rows.NEEDS_NORM)
NEEDS_PLANE = tl.constexpr(static_rows.NEEDS_PLANE)
NEEDS_DEVIATION = tl.constexpr(static_rows.NEEDS_DEVIATION)
CHANNELS = tl.constexpr(static_rows.CHANNELS)
SIDE = tl.constexpr(static_rows.SIDE)
ENCODER = tl.constexpr(static_rows.ENCODER)
KEPT = tl.constexpr(static_rows.KEPT)
ENCODER_FIELDS = tl.constexpr(static_encoders.ENCODER_FIELDS)
READ = tl.constexpr(static_encoders.READ)
ENCODER_BIAS = tl.constexpr(static_encoders.BIAS)
LATENTS = tl.constexpr(static_encoders.LATENTS)
K = tl.constexpr(static_encoders.K)
ENCODER_MEASURE = tl.constexpr(static_encoders.MEASURE)
SIGNED = tl.constexpr(static_encoders.SIGNED)
GATE_FIELDS = tl.constexpr(static_rows.GATE_FIELDS)
ABOVE = tl.constexpr(static_rows.ABOVE)
BELOW = tl.constexpr(static_rows.BELOW)
MEASURE = tl.constexpr(laws.MEASURE)
READS_COSINE = tl.constexpr(laws.COSINE)
READS_CENTRED = tl.constexpr(laws.CENTRED)
READS_SHARE = tl.constexpr(laws.SHARE)
ONLY_ACTIVE = tl.constexpr(laws.ONLY_ACTIVE)
EPSILON = tl.constexpr(laws.EPSILON)
COSINE = tl.constexpr(static_rows.COSINE)
GATE_BIAS = tl.constexpr(static_rows.GATE_BIAS)
ONWARD = tl.constexpr(static_rows.ONWARD)
TOKEN_FIELDS = tl.constexpr(static_tables.TOKEN_FIELDS)
SLOT = tl.constexpr(static_tables.SLOT)
ROW = tl.constexpr(static_tables.ROW)
SELECTED = tl.constexpr(static_tables.SELECTED)
FOLLOWERS = tl.constexpr(static_tables.FOLLOWERS)
DECIDES = tl.constexpr(static_tables.DECIDES)
FOLLOWS = tl.constexpr(static_tables.FOLLOWS)
MEASURED = tl.constexpr(static_tables.MEASURED)
RAMPED = tl.constexpr(static_tables.RAMPED)
LAW_STRIDE = tl.constexpr(static_rows.LAW_STRIDE)
BIAS = tl.constexpr(laws.BIAS)
THRESHOLD = tl.constexpr(laws.THRESHOLD)
INTERCEPT = tl.constexpr(laws.INTERCEPT)
SLOPE = tl.constexpr(laws.SLOPE)
FLOOR = tl.constexpr(laws.FLOOR)
CEILING = tl.constexpr(laws.CEILING)
RELATIVE = tl.constexpr(laws.RELATIVE)
TO_NORM = tl.constexpr(laws.TO_NORM)
TO_PLANE = tl.constexpr(laws.TO_PLANE)
TO_DEVIATION = tl.constexpr(laws.TO_DEVIATION)
TINY = tl.constexpr(torch.finfo(torch.float32).tiny)
