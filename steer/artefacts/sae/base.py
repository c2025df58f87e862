"""Sparse autoencoders: encode a residual into features, read and write single features.

    a = (x − b_dec) W_enc + b_enc        pre-activations (b_dec only where `subtract_b_dec`)
    f = activation(a)                    by architecture: ReLU, JumpReLU or TopK
    x ≈ f W_dec + b_dec

A clamp of feature i to τ adds (τ − f_i) · W_dec[i] and leaves the reconstruction error as it was
(Scaling Monosemanticity), so that only the rows of the clamped features are needed: `reads` and
`writes`. All arithmetic is float32.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import Card
from steer.artefacts.sae import canonical
from steer.artefacts.sae.architecture import Architecture
from steer.artefacts.sae.architectures import architecture_named
from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch, search_labels
from steer.artefacts.sae.normalisation import (
    PER_TOKEN,
    Normalisation,
    Scaling,
    check_normalisation,
    scaling,
)
from steer.errors import FileFormatError, IncompatibleArtefact, Unsupported
from steer.spec import Site


@dataclass(frozen=True, eq=False)
class FeatureReads:
    """How K features are read from a raw residual x: a = ⟨read, x⟩ / s + bias; f = a if
    a > threshold else 0. What a feature adds to x is f · t · write_scale · W_dec.

    `measure` says what both are relative to: nothing (`product`, s = t = 1), the norm of the token
    (`cosine`, s = t = ‖x‖), or the deviation σ of its channels (`centred`, s = σ + 1e-5, t = σ, for
    reads without a mean).

    `read` `[K, d_in]`, `bias` `[K]`, `threshold` `[K]`, float32. Under TopK the k largest a of all
    features must also be found (`reads(None)`).
    """

    read: Float[Tensor, "K d_in"]
    bias: Float[Tensor, " K"]
    threshold: Float[Tensor, " K"]
    measure: Literal["product", "cosine", "centred"] = "product"
    write_scale: float = 1.0


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder at one hook point. Build it with `SAE.of`.

    Guarantees: a supported architecture under its own name, float32 tensors on the CPU that are
    finite and agree in shape, one layer on the card.
    """

    architecture: str
    W_enc: Float[Tensor, "d_in d_sae"]
    b_enc: Float[Tensor, " d_sae"]
    W_dec: Float[Tensor, "d_sae d_in"]
    b_dec: Float[Tensor, " d_in"]
    threshold: Float[Tensor, " d_sae"] | None
    k: int | None
    subtract_b_dec: bool
    normalize: Normalisation
    card: Card
    labels: Mapping[int, FeatureLabel] = field(default_factory=dict)

    @staticmethod
    def of(
        architecture: str,
        *,
        W_enc: Tensor,
        b_enc: Tensor,
        W_dec: Tensor,
        b_dec: Tensor,
        layer: int,
        threshold: Tensor | None = None,
        k: int | None = None,
        subtract_b_dec: bool = True,
        normalize: str = "none",
        labels: Mapping[int, FeatureLabel] | None = None,
        **card: object,
    ) -> SAE:
        """A checked SAE from tensors of any float dtype; `card` holds any other field of `Card`.

        Raises `FileFormatError` for tensors that do not make an SAE, `Unsupported` for an
        architecture or normalisation that cannot be run.
        """
        kind = architecture_named(architecture)
        tensors = {"W_enc": W_enc, "b_enc": b_enc, "W_dec": W_dec, "b_dec": b_dec}
        if kind.needs_threshold and threshold is not None:
            tensors["threshold"] = threshold
        rows = {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in tensors.items()
        }
        _check_tensors(rows, kind)
        d_in, d_sae = rows["W_enc"].shape
        if kind.needs_k and (k is None or not 1 <= k <= d_sae):
            raise FileFormatError(
                f"a {kind.name} SAE of {d_sae} features needs a k from 1 to {d_sae}; got {k!r}"
            )
        _check_labels(labels or {}, d_sae)
        described = Card.model_validate({**card, "kind": "sae", "width": d_in, "layers": (layer,)})
        return SAE(
            architecture=kind.name,
            W_enc=rows["W_enc"],
            b_enc=rows["b_enc"],
            W_dec=rows["W_dec"],
            b_dec=rows["b_dec"],
            threshold=rows.get("threshold"),
            k=k if kind.needs_k else None,
            subtract_b_dec=subtract_b_dec,
            normalize=check_normalisation(normalize),
            card=described,
            labels=dict(sorted((labels or {}).items())),
        )

    @property
    def d_in(self) -> int:
        return self.W_enc.shape[0]

    @property
    def d_sae(self) -> int:
        return self.W_enc.shape[1]

    @property
    def layer(self) -> int:
        return self.card.layers[0]

    @property
    def site(self) -> Site:
        return self.card.site

    @property
    def competitive(self) -> bool:
        """Whether a feature's activation depends on the token's other features (TopK)."""
        return architecture_named(self.architecture).competitive

    def pre_activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """What the architecture's activation is applied to."""
        inputs = self._scaling(x).apply(x.float())
        if self.subtract_b_dec:
            inputs = inputs - self.b_dec
        return inputs @ self.W_enc + self.b_enc

    def encode(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """The feature activations of each token, float32, none of them negative."""
        kind = architecture_named(self.architecture)
        return kind.activation(self.pre_activations(x), threshold=self.threshold, k=self.k)

    def decode(
        self, z: Float[Tensor, "... d_sae"], x: Float[Tensor, "... d_in"] | None = None
    ) -> Float[Tensor, "... d_in"]:
        """The reconstruction from feature activations.

        `x` are the tokens that were encoded; only a normalisation that measures each token needs
        them, to undo itself.
        """
        output = z.float() @ self.W_dec + self.b_dec
        if self.normalize not in PER_TOKEN:
            return output
        if x is None:
            raise Unsupported(
                f"an SAE with normalize_activations {self.normalize!r} decodes only together with "
                "the tokens it encoded: call decode(z, x)",
                code="per_token_normalisation",
            )
        return self._scaling(x).undo(output)

    def latents(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """ReLU of the pre-activations, without top-k or threshold (Concept Steerers,
        2501.19066)."""
        return self.pre_activations(x).relu()

    def reads(self, features: Sequence[int] | None = None) -> FeatureReads:
        """The encoder rows of `features` (None: all), with b_dec folded into the bias, and a scale
        of each token into how it is measured.

        Raises `IncompatibleArtefact` (`feature_out_of_range`).
        """
        chosen = self._indices(features)
        read = self.W_enc.T[chosen].contiguous()
        bias = self.b_enc[chosen].double()
        if self.subtract_b_dec:
            bias = bias - read.double() @ self.b_dec.double()
        threshold = torch.zeros(len(read))
        if self.threshold is not None:
            # A negative threshold never acts: activations are not negative.
            threshold = self.threshold[chosen].clamp(min=0.0)
        if self.normalize == "constant_norm_rescale":
            root = self.d_in**0.5
            return FeatureReads(read * root, bias.float(), threshold, "cosine", 1 / root)
        if self.normalize == "layer_norm":
            centred = read - read.mean(dim=-1, keepdim=True)
            return FeatureReads(centred, bias.float(), threshold, "centred")
        return FeatureReads(read, bias.float(), threshold)

    def writes(self, features: Sequence[int] | None = None) -> Float[Tensor, "K d_in"]:
        """The decoder rows of `features` (None: all)."""
        return self.W_dec[self._indices(features)].contiguous()

    def search(self, query: str, *, limit: int = 20) -> tuple[FeatureMatch, ...]:
        """Features whose labels speak of `query`, best first."""
        return search_labels(self.labels, query, limit=limit)

    def to_bytes(self) -> bytes:
        """The canonical safetensors file: tensors, configuration, labels and nameless card."""
        tensors = {
            "W_enc": self.W_enc,
            "b_enc": self.b_enc,
            "W_dec": self.W_dec,
            "b_dec": self.b_dec,
        }
        if self.threshold is not None:
            tensors["threshold"] = self.threshold
        config = canonical.Config(
            architecture=self.architecture,
            k=self.k,
            subtract_b_dec=self.subtract_b_dec,
            normalize=self.normalize,
            card=self.card,
            labels=dict(self.labels),
        )
        return canonical.write(tensors, config)

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> SAE:
        """Reads a canonical file; raises `FileFormatError` for anything else."""
        tensors, config = canonical.read(data)
        card = config.card.model_copy(update={"name": name})
        return SAE.of(
            config.architecture,
            W_enc=tensors["W_enc"],
            b_enc=tensors["b_enc"],
            W_dec=tensors["W_dec"],
            b_dec=tensors["b_dec"],
            threshold=tensors.get("threshold"),
            k=config.k,
            subtract_b_dec=config.subtract_b_dec,
            normalize=config.normalize,
            labels=config.labels,
            layer=card.layers[0],
            **card.model_dump(exclude={"kind", "width", "layers"}),
        )

    @cached_property
    def sha256(self) -> str:
        """The identity of the SAE: the hash of its canonical file."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    def _scaling(self, x: Tensor) -> Scaling:
        if x.shape[-1] != self.d_in:
            raise IncompatibleArtefact(
                f"the SAE {self.card.name!r} reads rows of width {self.d_in}; got {x.shape[-1]}",
                code="wrong_width",
            )
        return scaling(self.normalize, x.float())

    def _indices(self, features: Sequence[int] | None) -> Tensor | slice:
        if features is None:
            return slice(None)
        for feature in features:
            if not 0 <= feature < self.d_sae:
                raise IncompatibleArtefact(
                    f"feature {feature} is out of range: the SAE {self.card.name!r} has features "
                    f"0 to {self.d_sae - 1}",
                    code="feature_out_of_range",
                )
        return torch.tensor(list(features), dtype=torch.long)


def _check_tensors(tensors: Mapping[str, Tensor], kind: Architecture) -> None:
    if kind.needs_threshold and "threshold" not in tensors:
        raise FileFormatError(f"a {kind.name} SAE needs a threshold for every feature")
    encoder = tensors["W_enc"]
    if encoder.ndim != 2 or 0 in encoder.shape:
        raise FileFormatError(f"W_enc must be [d_in, d_sae]; its shape is {list(encoder.shape)}")
    d_in, d_sae = encoder.shape
    shapes = {
        "b_enc": [d_sae],
        "W_dec": [d_sae, d_in],
        "b_dec": [d_in],
        "threshold": [d_sae],
    }
    for name, tensor in tensors.items():
        shape = shapes.get(name, [d_in, d_sae])
        if list(tensor.shape) != shape:
            raise FileFormatError(
                f"{name} has the shape {list(tensor.shape)}; beside W_enc {[d_in, d_sae]} "
                f"it must be {shape}",
                code="mixed_widths",
            )
        # The extremes say it too, without a copy of the largest tensors there are.
        if not all(bool(end.isfinite()) for end in tensor.aminmax()):
            raise FileFormatError(f"{name} contains NaN or Inf", code="not_finite")


def _check_labels(labels: Mapping[int, FeatureLabel], d_sae: int) -> None:
    wrong = sorted(feature for feature in labels if not 0 <= feature < d_sae)
    if wrong:
        raise FileFormatError(
            f"there are labels for the features {wrong[:5]}, but the SAE has features 0 to "
            f"{d_sae - 1}"
        )
