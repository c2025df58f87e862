"""What of an SAE is asked of every token where its features compete (`steer.edits.Encoder`).

TopK and its like say which features are active: those whose pre-activation reaches a cutoff, the
k-th largest, or the largest of a group. Matching pursuit says how active each is.

T tokens, d the width, L latents that are computed of each token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from steer.artefacts.sae.normalisation import Normalisation, scaling
from steer.artefacts.sae.pursuit import Pursuit, pursue
from steer.artefacts.sae.storage.rows import BLOCK_BYTES, FeatureRows
from steer.laws import CENTRED, COSINE, EPSILON, PRODUCT, deviation

_TINY = torch.finfo(torch.float32).tiny
_MOST_ACTIVATIONS = 2**24
"""As many activations are pursued at once: 64 MiB."""


@dataclass(frozen=True, eq=False)
class LatentRows:
    """Rows `read` `[L, d]` and `bias` `[L]` that read x by `measure`, as laws do.

    `read` may be in half precision, as a file has it: then each product is multiplied with its
    `scale` `[L]`, and x is centred where the rows of a float32 matrix would be. All arithmetic is
    float32, block by block where the rows are not.
    """

    read: Float[Tensor, "L d"]
    bias: Float[Tensor, " L"]
    measure: float = PRODUCT
    scale: Float[Tensor, " L"] | None = None

    @property
    def plain(self) -> bool:
        """Whether the rows are what kernels read: float32, with nothing beside them."""
        return self.read.dtype == torch.float32 and self.scale is None

    def on(self, device: torch.device) -> LatentRows:
        """The same on `device`, in rows without gaps."""
        scale = None if self.scale is None else self.scale.to(device)
        read, bias = self.read.to(device).contiguous(), self.bias.to(device).contiguous()
        return replace(self, read=read, bias=bias, scale=scale)

    def in_float32(self) -> LatentRows:
        """The same as plain rows."""
        if self.plain:
            return self
        read = torch.cat(list(self._blocks()))
        if self.scale is not None:
            read *= self.scale[:, None]
        if self.measure == CENTRED:
            read -= read.mean(dim=-1, keepdim=True)
        return LatentRows(read, self.bias, self.measure)

    def of(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "T L"]:
        """The pre-activations of each token."""
        if self.measure == COSINE:
            x = x / x.norm(dim=-1, keepdim=True).clamp_min(_TINY)
        elif self.measure == CENTRED:
            mean = 0.0 if self.plain else x.mean(dim=-1, keepdim=True)
            x = (x - mean) / (deviation(x) + EPSILON)
        if self.plain:
            return torch.addmm(self.bias, x, self.read.T)
        products = torch.cat([x @ block.T for block in self._blocks()], dim=1)
        return products * (1.0 if self.scale is None else self.scale) + self.bias

    def _blocks(self) -> Iterator[Tensor]:
        size = max(1, BLOCK_BYTES // (4 * self.read.shape[1]))
        return (block.float() for block in torch.split(self.read, size))


@dataclass(frozen=True, eq=False)
class TopKEncoder:
    """A feature is active only among the k largest pre-activations; of a `signed` SAE (abstopk),
    among the k largest by magnitude.

    `identity` is the SAE's hash, with k where it is not the SAE's own, so that clamps of one SAE
    share one encode.
    """

    identity: str
    rows: LatentRows
    k: int
    signed: bool = False
    gives_activations = False
    ranks = True

    @property
    def latents(self) -> int:
        return len(self.rows.bias)

    def on(self, device: torch.device) -> TopKEncoder:
        return replace(self, rows=self.rows.on(device))

    def tell(self, x: Float[Tensor, "T d"], columns: Int[Tensor, " K"]) -> Float[Tensor, "T K"]:
        return self.least_active(x).expand(-1, len(columns))

    def least_active(self, x: Float[Tensor, "T d"]) -> Float[Tensor, "T 1"]:
        """The price of being active: halfway from the k-th to the next pre-activation.

        Halfway, because a clamped feature is read by a product of another shape, whose rounding
        differs: at the k-th value itself, the last active feature would often count as inactive.
        """
        values = self.rows.of(x)
        values = values.abs_() if self.signed else values.clamp_min_(0.0)
        return _between(values, self.k)


@dataclass(frozen=True, eq=False)
class GroupEncoder:
    """A feature is active only as the largest of its group of `size` neighbours (groupmax).

    The rows are those of `groups` `[G]`, a few of all, in their order; columns are features.
    """

    identity: str
    rows: LatentRows
    size: int
    groups: Int[Tensor, " G"]
    gives_activations = False
    ranks = False

    @property
    def latents(self) -> int:
        return len(self.rows.bias)

    def on(self, device: torch.device) -> GroupEncoder:
        return replace(self, rows=self.rows.on(device), groups=self.groups.to(device))

    def tell(self, x: Float[Tensor, "T d"], columns: Int[Tensor, " K"]) -> Float[Tensor, "T K"]:
        """The price of each edit's group: halfway from its largest to the next."""
        values = self.rows.of(x).clamp_min_(0.0).reshape(len(x), -1, self.size)
        places = torch.searchsorted(self.groups, columns // self.size)
        return _between(values, 1)[..., 0].index_select(1, places)


def _between(values: Float[Tensor, "... L"], k: int) -> Float[Tensor, "... 1"]:
    """Halfway from the k-th largest to the next; 0 where there is no next."""
    if k >= values.shape[-1]:
        return values.new_zeros(*values.shape[:-1], 1)
    return values.topk(k + 1, dim=-1).values[..., -2:].mean(-1, keepdim=True)


@dataclass(frozen=True, eq=False)
class PursuitEncoder:
    """Matching pursuit, whose features are found one after another: it tells the activations, and
    columns are features.

    `k` takes the place of the rule's own number of steps.
    """

    identity: str
    decoder: FeatureRows
    b_dec: Float[Tensor, " d"]
    rule: Pursuit
    normalize: Normalisation = "none"
    k: int | None = None
    gives_activations = True
    ranks = False

    @property
    def latents(self) -> int:
        return self.decoder.shape[0]

    def on(self, device: torch.device) -> PursuitEncoder:
        return replace(self, decoder=self.decoder.on(device), b_dec=self.b_dec.to(device))

    def tell(self, x: Float[Tensor, "T d"], columns: Int[Tensor, " K"]) -> Float[Tensor, "T K"]:
        """The activations of each edit's feature, all of them computed for some tokens at once."""
        inputs = scaling(self.normalize, x).apply(x) - self.b_dec
        parts = torch.split(inputs, max(1, _MOST_ACTIVATIONS // self.latents))
        each = (pursue(part, self.decoder, self.rule, k=self.k) for part in parts)
        return torch.cat([z.index_select(1, columns) for z in each])
