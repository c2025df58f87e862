"""Sparse autoencoders: encode a residual into features, read and write single features.

    a = (x − b_dec) W_enc + b_enc        pre-activations (b_dec only where `subtract_b_dec`)
    f = activation(a)                    by architecture: ReLU, JumpReLU, TopK, …
    x ≈ f W_dec + b_dec                  a transcoder's output, + W_skip x where it has that

A clamp of feature i to τ adds (τ − f_i) · W_dec[i] and leaves the reconstruction error as it was
(Scaling Monosemanticity), so that only the rows of the clamped features are needed: `reads` and
`writes`. All arithmetic is float32, whatever type the rows are stored in.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import IO, Any

import torch
from jaxtyping import Float
from torch import Tensor

from steer.artefacts.control_vector import Card
from steer.artefacts.sae.architectures import architecture_named
from steer.artefacts.sae.checks import (
    check_labels,
    check_numbers,
    check_settings,
    check_shapes,
)
from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch, search_labels
from steer.artefacts.sae.normalisation import (
    PER_TOKEN,
    Normalisation,
    Scaling,
    check_normalisation,
    scaling,
)
from steer.artefacts.sae.pursuit import Pursuit, pursue
from steer.artefacts.sae.reads import FeatureReads, Measure
from steer.artefacts.sae.storage import canonical
from steer.artefacts.sae.storage.file_arrays import ByteSource, HeldBytes, OpenedFile
from steer.artefacts.sae.storage.rows import FeatureRows, held_rows
from steer.errors import FileFormatError, IncompatibleArtefact, Unsupported
from steer.model import HookPoint, forward_order
from steer.spec import Site

_MEASURES: Mapping[Normalisation, Measure] = {
    "layer_norm": "centred",
    "constant_norm_rescale": "cosine",
}


@dataclass(frozen=True, eq=False)
class SAE:
    """A sparse autoencoder at one hook point, or a transcoder from one to another of its layer.

    Build it with `SAE.of` from tensors, or `SAE.of_rows` from rows that may lie in a file.

    Guarantees: a supported architecture under its own name, tensors on the CPU that are finite and
    agree in shape, one layer on the card. All but the rows are float32.
    """

    architecture: str
    encoder: FeatureRows
    decoder: FeatureRows
    b_enc: Float[Tensor, " d_sae"]
    b_dec: Float[Tensor, " d_out"]
    threshold: Float[Tensor, " d_sae"] | None
    k: int | None
    subtract_b_dec: bool
    normalize: Normalisation
    card: Card
    labels: Mapping[int, FeatureLabel] = field(default_factory=dict)
    W_skip: Float[Tensor, "d_out d_in"] | None = None
    pursuit: Pursuit | None = None
    layout: int = canonical.LAYOUT

    @staticmethod
    def of(architecture: str, *, W_enc: Tensor | None = None, W_dec: Tensor, **rest: Any) -> SAE:
        """A checked SAE from tensors of any float type, `W_enc` `[d_in, d_sae]` (without it, the
        encoder is the decoder) and `W_dec` `[d_sae, d_out]`; the rest is as for `of_rows`."""
        encoder = None
        if W_enc is not None:
            if W_enc.ndim != 2 or 0 in W_enc.shape:
                raise FileFormatError(
                    f"W_enc must be [d_in, d_sae]; its shape is {list(W_enc.shape)}"
                )
            encoder = held_rows(W_enc.T.contiguous())
        return SAE.of_rows(
            architecture, encoder=encoder, decoder=held_rows(W_dec.contiguous()), **rest
        )

    @staticmethod
    def of_rows(
        architecture: str,
        *,
        decoder: FeatureRows,
        b_dec: Tensor,
        layer: int,
        encoder: FeatureRows | None = None,
        b_enc: Tensor | None = None,
        threshold: Tensor | None = None,
        k: int | None = None,
        W_skip: Tensor | None = None,
        pursuit: Pursuit | None = None,
        subtract_b_dec: bool = True,
        normalize: str = "none",
        labels: Mapping[int, FeatureLabel] | None = None,
        layout: int = canonical.LAYOUT,
        trusted: bool = False,
        **card: object,
    ) -> SAE:
        """A checked SAE; `card` holds any other field of `Card`, such as `site` and, for a
        transcoder, `write_site`.

        The rows are gone through once, block by block, unless they are `trusted`. Raises
        `FileFormatError` for tensors that do not make an SAE, `Unsupported` for an architecture or
        normalisation that cannot be run.
        """
        kind = architecture_named(architecture)
        encoder = decoder if encoder is None or kind.iterative else encoder
        given = {
            "b_enc": b_enc if b_enc is not None else torch.zeros(decoder.shape[0]),
            "b_dec": b_dec,
            "threshold": threshold if kind.needs_threshold else None,
            "W_skip": W_skip,
        }
        small = {
            name: tensor.detach().to("cpu", torch.float32).contiguous()
            for name, tensor in given.items()
            if tensor is not None
        }
        if kind.iterative:
            # It subtracts what its reconstruction adds, or neither; and it has no encoder's bias.
            small["b_enc"] = torch.zeros_like(small["b_enc"])
            if not subtract_b_dec:
                small["b_dec"], subtract_b_dec = torch.zeros_like(small["b_dec"]), True
        check_shapes(
            encoder, decoder, small, kind, writes_elsewhere=card.get("write_site") is not None
        )
        described = Card.model_validate(
            {**card, "kind": "sae", "width": encoder.shape[1], "layers": (layer,)}
        )
        check_settings(kind, k, decoder.shape[0], described, subtract_b_dec, W_skip is not None)
        check_labels(labels or {}, decoder.shape[0])
        if not trusted:
            check_numbers(encoder, decoder, small)
        return SAE(
            architecture=kind.name,
            encoder=encoder,
            decoder=decoder,
            b_enc=small["b_enc"],
            b_dec=small["b_dec"],
            threshold=small.get("threshold"),
            k=k if kind.needs_k else None,
            subtract_b_dec=subtract_b_dec,
            normalize=check_normalisation(normalize),
            card=described,
            labels=dict(sorted((labels or {}).items())),
            W_skip=small.get("W_skip"),
            pursuit=(pursuit or Pursuit()) if kind.iterative else None,
            layout=layout,
        )

    @property
    def d_in(self) -> int:
        return self.encoder.shape[1]

    @property
    def d_out(self) -> int:
        """The width of what is written: that of the input, but for some transcoders."""
        return self.decoder.shape[1]

    @property
    def d_sae(self) -> int:
        return self.decoder.shape[0]

    @property
    def W_enc(self) -> Float[Tensor, "d_in d_sae"]:  # noqa: N802 - the field's name
        """The whole encoder in memory, float32: for SAEs that are small."""
        return self.encoder.take(None).T.contiguous()

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_out"]:  # noqa: N802
        """The whole decoder in memory, float32: for SAEs that are small."""
        return self.decoder.take(None)

    @property
    def layer(self) -> int:
        return self.card.layers[0]

    @property
    def site(self) -> Site:
        """The site that is read, and without a `write_site` on the card written too."""
        return self.card.site

    @property
    def write_point(self) -> HookPoint:
        """Where its features write: the point that it reads, or a transcoder's output."""
        return HookPoint(self.layer, self.card.write_site or self.site)

    @property
    def is_transcoder(self) -> bool:
        """Whether it reads at one site and writes at another of the same layer."""
        return self.card.write_site is not None

    @property
    def measure(self) -> Measure:
        """What its features are read and written relative to (`FeatureReads`)."""
        return _MEASURES.get(self.normalize, "product")

    @property
    def write_scale(self) -> float:
        """What its rows are multiplied with when they are written (`FeatureReads`)."""
        return self.d_in**-0.5 if self.measure == "cosine" else 1.0

    @property
    def competitive(self) -> bool:
        """Whether a feature's activation depends on the token's other features (TopK)."""
        return architecture_named(self.architecture).competitive

    @property
    def signed(self) -> bool:
        """Whether activations may be negative."""
        return architecture_named(self.architecture).signed

    @property
    def grouped(self) -> bool:
        """Whether features compete within groups alone, of which there are k."""
        return architecture_named(self.architecture).grouped

    @property
    def takes_k(self) -> bool:
        """Whether features are found by a number of them that a request may choose."""
        return self.pursuit is not None or (self.k is not None and not self.grouped)

    @property
    def writes_later(self) -> bool:
        """Whether it is a transcoder that writes behind what it reads, in rows as long."""
        read, written = HookPoint(self.layer, self.site), self.write_point
        later = forward_order(read) < forward_order(written)
        return self.is_transcoder and later and self.d_in == self.d_out

    def resident_bytes(self) -> int:
        """The bytes of its tensors that are in memory; rows in a file are not."""
        matrices = [self.decoder] if self.encoder is self.decoder else [self.encoder, self.decoder]
        vectors = (self.b_enc, self.b_dec, self.threshold, self.W_skip)
        return sum(rows.resident_bytes for rows in matrices) + sum(
            tensor.nbytes for tensor in vectors if tensor is not None
        )

    def pre_activations(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """What the architecture's activation is applied to; of matching pursuit, its first step."""
        return self.encoder.along(self._inputs(x)) + self.b_enc

    def encode(
        self, x: Float[Tensor, "... d_in"], *, k: int | None = None
    ) -> Float[Tensor, "... d_sae"]:
        """The feature activations of each token, float32, negative ones only under abstopk.

        `k` takes the place of the SAE's own k, or of matching pursuit's number of steps.
        """
        kind = architecture_named(self.architecture)
        if self.pursuit is not None:
            return pursue(self._inputs(x), self.decoder, self.pursuit, k=k)
        return kind.activation(
            self.pre_activations(x), threshold=self.threshold, k=self.k if k is None else k
        )

    def decode(
        self, z: Float[Tensor, "... d_sae"], x: Float[Tensor, "... d_in"] | None = None
    ) -> Float[Tensor, "... d_out"]:
        """The reconstruction from feature activations; a transcoder's is of its output.

        `x` are the tokens that were encoded; only a normalisation that measures each token needs
        them, to undo itself, and a transcoder that passes its input on (`W_skip`).
        """
        output = self.decoder.combined(z.float()) + self.b_dec
        if x is None and (self.normalize in PER_TOKEN or self.W_skip is not None):
            why = "W_skip"
            if self.W_skip is None:
                why = f"normalize_activations {self.normalize!r}"
            raise Unsupported(
                f"an SAE with {why} decodes only together with the tokens it encoded: call "
                "decode(z, x)",
                code="per_token_normalisation",
            )
        if x is not None and self.W_skip is not None:
            output = output + x.float() @ self.W_skip.T
        return output if x is None else self._scaling(x).undo(output)

    def latents(self, x: Float[Tensor, "... d_in"]) -> Float[Tensor, "... d_sae"]:
        """ReLU of the pre-activations, without top-k or threshold (Concept Steerers,
        2501.19066)."""
        return self.pre_activations(x).relu()

    def reads(self, features: Sequence[int] | None = None) -> FeatureReads:
        """The encoder rows of `features` (None: all), with b_dec and scales folded in.

        Raises `IncompatibleArtefact` (`feature_out_of_range`).
        """
        self.check_features(features)
        chosen = slice(None) if features is None else torch.tensor(list(features), dtype=torch.long)
        read = self.encoder.take(features)
        bias = self._read_bias(chosen, read)
        threshold = torch.zeros(len(read))
        if self.signed:
            threshold -= torch.inf
        if self.threshold is not None:
            # A negative threshold never acts: activations are not negative.
            threshold = self.threshold[chosen].clamp(min=0.0)
        if self.measure == "centred":
            read = (read.double() - read.double().mean(-1, keepdim=True)).float()
        if self.measure == "cosine":
            # The length that is divided by is ‖x‖/√d.
            read = read * self.d_in**0.5
        return FeatureReads(read, bias, threshold, self.measure, self.write_scale)

    def read_biases(self) -> Float[Tensor, " d_sae"]:
        """The biases of `reads` of all features, without their rows."""
        blocks = self.encoder.blocks()
        each = (self._read_bias(slice(at, at + len(rows)), rows) for at, rows in blocks)
        return torch.cat(list(each))

    def _read_bias(self, chosen: slice | Tensor, rows: Float[Tensor, "K d_in"]) -> Tensor:
        bias = self.b_enc[chosen].double()
        if self.subtract_b_dec:
            bias = bias - rows.double() @ self.b_dec.double()
        return bias.float()

    def writes(self, features: Sequence[int] | None = None) -> Float[Tensor, "K d_out"]:
        """The decoder rows of `features` (None: all)."""
        self.check_features(features)
        return self.decoder.take(features)

    def search(self, query: str, *, limit: int = 20) -> tuple[FeatureMatch, ...]:
        """Features whose labels speak of `query`, best first."""
        return search_labels(self.labels, query, limit=limit)

    def pieces(self) -> Iterator[bytes]:
        """The canonical file, piece by piece: tensors, configuration, labels and nameless card."""
        vectors = {"b_enc": self.b_enc, "b_dec": self.b_dec}
        for name, tensor in (("threshold", self.threshold), ("W_skip", self.W_skip)):
            if tensor is not None:
                vectors[name] = tensor
        config = canonical.Config(
            architecture=self.architecture,
            k=self.k,
            subtract_b_dec=self.subtract_b_dec,
            normalize=self.normalize,
            card=self.card,
            labels=dict(self.labels),
            pursuit=self.pursuit,
            layout=self.layout,
        )
        return canonical.pieces(canonical.StoredParts(self.encoder, self.decoder, vectors), config)

    def to_bytes(self) -> bytes:
        """The canonical file in memory: for SAEs that are small."""
        return b"".join(self.pieces())

    @staticmethod
    def from_bytes(data: bytes, *, name: str = "") -> SAE:
        """Reads a canonical file; raises `FileFormatError` for anything else."""
        return _parsed(HeldBytes(data), name, trusted=False)

    @staticmethod
    def from_file(stream: IO[bytes], *, name: str = "", sha256: str | None = None) -> SAE:
        """Reads an open canonical file, whose rows stay in it where there are many.

        With `sha256`, the hash that the file is known to have, its numbers are not looked at again.
        """
        sae = _parsed(OpenedFile.of(stream), name, trusted=sha256 is not None)
        if sha256 is not None:
            sae.__dict__["sha256"] = sha256
        return sae

    @cached_property
    def sha256(self) -> str:
        """The identity of the SAE: the hash of its canonical file."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()

    def _inputs(self, x: Tensor) -> Tensor:
        inputs = self._scaling(x).apply(x.float())
        return inputs - self.b_dec if self.subtract_b_dec else inputs

    def _scaling(self, x: Tensor) -> Scaling:
        if x.shape[-1] != self.d_in:
            raise IncompatibleArtefact(
                f"the SAE {self.card.name!r} reads rows of width {self.d_in}; got {x.shape[-1]}",
                code="wrong_width",
            )
        return scaling(self.normalize, x.float())

    def check_features(self, features: Sequence[int] | None) -> None:
        """Raises `IncompatibleArtefact` (`feature_out_of_range`)."""
        for feature in features or ():
            if not 0 <= feature < self.d_sae:
                raise IncompatibleArtefact(
                    f"feature {feature} is out of range: the SAE {self.card.name!r} has features "
                    f"0 to {self.d_sae - 1}",
                    code="feature_out_of_range",
                )


def _parsed(source: ByteSource, name: str, *, trusted: bool) -> SAE:
    parts, config = canonical.parse(source)
    card = config.card.model_copy(update={"name": name})
    return SAE.of_rows(
        config.architecture,
        encoder=parts.encoder,
        decoder=parts.decoder,
        **parts.vectors,
        k=config.k,
        subtract_b_dec=config.subtract_b_dec,
        normalize=config.normalize,
        labels=config.labels,
        pursuit=config.pursuit,
        layout=config.layout,
        trusted=trusted,
        layer=card.layers[0],
        **card.model_dump(exclude={"kind", "width", "layers"}),
    )
