"""A decoder layer as vLLM runs it, with random weights, with the taps of Steer or without.

The stream lies in two halves, and each part stands behind a fused add and norm. Every request
attends to a cache of its own that is full. Left out is the rotation of queries and keys, which is
no part of the size that is looked for.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.gpu.device import Device
from benchmarks.vllm.shapes import Shape

Halves = tuple[Tensor, Tensor]
CONTEXT = 512
"""Tokens in the cache of each request."""
_EPSILON = 1e-6


class NoTap(nn.Module):
    def forward(self, hidden: Tensor, residual: Tensor) -> Halves:
        return hidden, residual


class TappedNorm(nn.Module):
    """A tap, and the add and norm behind it, as one compiled function."""

    def __init__(self, tap: nn.Module, width: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.tap = tap
        self.weight = nn.Parameter(torch.ones(width, dtype=dtype), requires_grad=False)

    def forward(self, hidden: Tensor, residual: Tensor) -> Halves:
        """What the next part reads, and the stream before it adds anything."""
        hidden, residual = self.tap(hidden, residual)
        stream = hidden.float() + residual.float()
        normed = stream * torch.rsqrt(stream.square().mean(-1, keepdim=True) + _EPSILON)
        return normed.to(hidden.dtype) * self.weight, stream.to(hidden.dtype)


class Weights:
    """The matrices and the cache of one layer; drawn on the device."""

    def __init__(
        self, shape: Shape, device: Device, dtype: torch.dtype, *, requests: int, context: int
    ) -> None:
        width, heads = shape.d_model, shape.heads
        self.heads, self.kv_heads = heads, shape.kv_heads or heads
        self.head = width // heads
        generator = torch.Generator(device.torch).manual_seed(0)

        def draw(*size: int, scale: float = 1.0) -> Tensor:
            made = torch.randn(size, generator=generator, device=device.torch, dtype=dtype)
            return made * scale

        rows = (heads + 2 * self.kv_heads) * self.head
        self.attention_in = draw(rows, width, scale=width**-0.5)
        self.attention_out = draw(width, width, scale=width**-0.5)
        self.mlp_in = draw(2 * shape.ffn, width, scale=width**-0.5)
        self.mlp_out = draw(width, shape.ffn, scale=shape.ffn**-0.5)
        self.keys = draw(requests, self.kv_heads, context, self.head)
        self.values = draw(requests, self.kv_heads, context, self.head)


class DecoderLayer:
    """One layer, on the same weights with taps or without; `tap(n)` is its n-th of two."""

    def __init__(
        self, weights: Weights, device: Device, width: int, tap: Callable[[int], nn.Module]
    ) -> None:
        self._weights = weights
        dtype = weights.attention_in.dtype
        norms = [TappedNorm(tap(n), width, dtype).to(device.torch) for n in range(2)]
        self._norms = [device.compiled(one.forward) for one in norms]
        self._gated = device.compiled(_gated)

    @torch.inference_mode()
    def __call__(self, hidden: Tensor, residual: Tensor, requests: int) -> Halves:
        """Both halves `[T, d]` after the layer, T tokens of so many requests, as many of each."""
        weights = self._weights
        normed, residual = self._norms[0](hidden, residual)
        hidden = self._attention(normed, requests) @ weights.attention_out.T
        normed, residual = self._norms[1](hidden, residual)
        return self._gated(normed @ weights.mlp_in.T) @ weights.mlp_out.T, residual

    def _attention(self, normed: Tensor, requests: int) -> Tensor:
        weights, tokens = self._weights, len(normed)
        states = normed @ weights.attention_in.T
        query = states[:, : weights.heads * weights.head]
        query = query.reshape(requests, tokens // requests, weights.heads, weights.head)
        found = functional.scaled_dot_product_attention(
            query.transpose(1, 2),
            weights.keys[:requests],
            weights.values[:requests],
            enable_gqa=weights.kv_heads != weights.heads,
        )
        return found.transpose(1, 2).reshape(tokens, -1)


def _gated(both: Tensor) -> Tensor:
    gate, up = both.chunk(2, dim=-1)
    return functional.silu(gate) * up
