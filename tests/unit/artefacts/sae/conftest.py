from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from steer.artefacts.sae import SAE, Pursuit

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
        if self.sae.architecture == "groupmax":
            assert self.sae.k is not None
            groups = pre.reshape(*pre.shape[:-1], self.sae.k, -1)
            best = groups == groups.max(-1, keepdims=True)
            return np.where(best, np.maximum(groups, 0.0), 0.0).reshape(pre.shape)
        if self.sae.architecture == "abstopk":
            last = np.sort(np.abs(pre), axis=-1)[..., -(self.sae.k or 0)]
            return np.where(np.abs(pre) >= last[..., None], pre, 0.0)
        if self.sae.architecture == "matching_pursuit":
            return self.pursued(x)
        if self.sae.architecture == "jumprelu":
            assert self.sae.threshold is not None
            return np.where(pre > self.sae.threshold.double().numpy(), np.maximum(pre, 0.0), 0.0)
        return np.maximum(pre, 0.0)

    def pursued(self, x: Array) -> Array:
        """Token by token, as the paper writes it."""
        rule, rows = self.sae.pursuit, self.sae.W_dec.double().numpy()
        assert rule is not None
        left = (self.normalised(x)[0] - self.sae.b_dec.double().numpy()).reshape(-1, x.shape[-1])
        features = np.zeros((len(left), len(rows)))
        for row, z in zip(left, features, strict=True):
            token = row
            for _ in range(rule.max_iterations or x.shape[-1]):
                products = np.maximum(rows @ token, 0.0)
                best, support = products.argmax(), z != 0
                z[best] += products[best]
                token = token - products[best] * rows[best]
                repeated = rule.stop_on_duplicate_support and ((z != 0) == support).all()
                if repeated or np.linalg.norm(token) < rule.residual_threshold:
                    break
        return features.reshape(*x.shape[:-1], -1)

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
            "k": {"topk": 6, "abstopk": 6, "groupmax": 8}.get(architecture),
            "layer": 2,
            "model": "tiny",
        }
        if architecture == "matching_pursuit":
            rows = given["W_dec"]
            assert isinstance(rows, torch.Tensor)
            given |= {"W_dec": rows / rows.norm(dim=-1, keepdim=True), "W_enc": None}
            given |= {"pursuit": Pursuit(max_iterations=5)}
        return SAE.of(architecture, **(given | fields))

    return make
