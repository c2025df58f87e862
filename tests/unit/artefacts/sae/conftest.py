from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from steer.artefacts.sae import SAE

MakeSAE = Callable[..., SAE]
Array = NDArray[np.float64]


@dataclass(frozen=True)
class Float64SAE:
    """An SAE in float64 numpy, written from the definitions, not from `steer.artefacts.sae`."""

    sae: SAE

    def normalised(self, x: Array) -> tuple[Array, Array, Array]:
        """Each token as the encoder sees it, and the factor and shift of the way back."""
        if self.sae.normalize == "layer_norm":
            mean = x.mean(-1, keepdims=True)
            deviation = x.std(-1, ddof=1, keepdims=True)
            return (x - mean) / (deviation + 1e-5), deviation, mean
        if self.sae.normalize == "constant_norm_rescale":
            factor = np.linalg.norm(x, axis=-1, keepdims=True) / np.sqrt(x.shape[-1])
            return x / factor, factor, np.zeros_like(factor)
        return x, np.ones((*x.shape[:-1], 1)), np.zeros((*x.shape[:-1], 1))

    def pre_activations(self, x: Array) -> Array:
        inputs = self.normalised(x)[0]
        if self.sae.subtract_b_dec:
            inputs = inputs - self.sae.b_dec.double().numpy()
        return inputs @ self.sae.W_enc.double().numpy() + self.sae.b_enc.double().numpy()

    def encode(self, x: Array) -> Array:
        pre = self.pre_activations(x)
        if self.sae.architecture == "topk":
            assert self.sae.k is not None
            kept = np.zeros_like(pre)
            flat, out = pre.reshape(-1, pre.shape[-1]), kept.reshape(-1, pre.shape[-1])
            for row, target in zip(flat, out, strict=True):
                best = np.argsort(-row)[: self.sae.k]
                target[best] = np.maximum(row[best], 0.0)
            return kept
        if self.sae.architecture == "jumprelu":
            assert self.sae.threshold is not None
            return np.where(pre > self.sae.threshold.double().numpy(), np.maximum(pre, 0.0), 0.0)
        return np.maximum(pre, 0.0)

    def decode(self, features: Array, x: Array) -> Array:
        _, factor, shift = self.normalised(x)
        output = features @ self.sae.W_dec.double().numpy() + self.sae.b_dec.double().numpy()
        return output * factor + shift


@pytest.fixture(scope="session")
def float64() -> type[Float64SAE]:
    return Float64SAE


@pytest.fixture(scope="session")
def make_sae() -> MakeSAE:
    """A random SAE whose features are on for a middling share of random tokens."""

    def make(architecture: str = "standard", *, seed: int = 0, **fields: object) -> SAE:
        d_in, d_sae = 12, 40
        generator = torch.Generator().manual_seed(seed)

        def draw(*shape: int) -> torch.Tensor:
            return torch.randn(shape, generator=generator)

        given = {
            "W_enc": draw(d_in, d_sae) / d_in**0.5,
            "b_enc": 0.3 * draw(d_sae),
            "W_dec": draw(d_sae, d_in) / d_sae**0.5,
            "b_dec": draw(d_in),
            "threshold": draw(d_sae).abs() if architecture == "jumprelu" else None,
            "k": 6 if architecture == "topk" else None,
            "layer": 2,
            "model": "tiny",
        }
        return SAE.of(architecture, **(given | fields))

    return make
