"""The weights of an SAE while it is trained, and the SAE that they make."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.pursuit import Pursuit
from steer.fit.saes.activation import above, largest_of_batch, largest_of_rows, pursued
from steer.fit.saes.options import SAEOptions
from steer.model import HookPoint

OUTLIER = 4.0
_FIRST_THRESHOLD = 0.1
_SLOW = 0.01


@dataclass(frozen=True)
class RowUnits:
    """Training sees (x − mean) · scale, whose mean length is √d; both are those of typical rows."""

    mean: Float[Tensor, " d"]
    scale: float

    @staticmethod
    def of(rows: Float[Tensor, "n d"]) -> RowUnits:
        kept = rows[typical(rows)]
        mean = kept.mean(0)
        length = float((kept - mean).norm(dim=-1).mean())
        return RowUnits(mean, math.sqrt(rows.shape[1]) / max(length, 1e-12))

    def of_states(self, rows: Float[Tensor, "n d"]) -> Float[Tensor, "n d"]:
        return (rows - self.mean) * self.scale


def typical(rows: Float[Tensor, "n d"]) -> Bool[Tensor, " n"]:
    """Which rows are no longer than `OUTLIER` times the median: many models keep, on a few tokens
    that say nothing, states of a hundred times the length of others (2402.17762)."""
    lengths = rows.norm(dim=-1)
    short: Tensor = lengths <= OUTLIER * lengths.median()
    return short


@dataclass(frozen=True)
class Passed:
    """A batch through the network: what it rebuilds, the latents that are active, each with its
    value, and how many are active on each row where the thresholds learn from it."""

    rebuilt: Float[Tensor, "T d"]
    latents: Int[Tensor, " active"]
    values: Float[Tensor, " active"]
    count: Float[Tensor, " T"] | None = None


class SAENetwork(nn.Module):
    """An SAE in the units of `RowUnits`; decoder rows have length one.

    The decoder begins with random directions and the encoder as its transpose. Of the decoder only
    the rows of active latents are worked with.
    """

    def __init__(self, width: int, options: SAEOptions) -> None:
        super().__init__()
        self.options = options
        generator = torch.Generator().manual_seed(options.seed)
        rows = torch.randn(options.latents, width, generator=generator)
        rows /= rows.norm(dim=-1, keepdim=True)
        self.decoder = nn.Parameter(rows)
        self.bias = nn.Parameter(torch.zeros(width))
        self.pursues = options.architecture == "matching_pursuit"
        if not self.pursues:
            self.encoder = nn.Parameter(rows.clone())
            self.encoder_bias = nn.Parameter(torch.zeros(options.latents))
        if options.architecture == "jumprelu":
            first = torch.full((options.latents,), math.log(_FIRST_THRESHOLD))
            self.log_threshold = nn.Parameter(first)
        self.register_buffer("least", torch.zeros(()))
        self.least: Tensor
        """BatchTopK's threshold: the running mean of the least activation that a batch kept."""

    def forward(self, x: Float[Tensor, "T d"]) -> Passed:
        options = self.options
        if options.architecture == "jumprelu":
            kept, count = above(self.pre(x), self.log_threshold.exp())
            active = kept != 0
            rebuilt = kept @ self.decoder + self.bias
            return Passed(rebuilt, active.nonzero()[:, 1], kept[active], count)
        if self.pursues:
            places, values = pursued(x - self.bias, self.decoder, options.k)
            each = torch.full_like(x[:, 0], options.k)
            return self._rebuilt(places.flatten(), values.flatten(), each)
        pre = self.pre(x)
        if options.architecture == "topk":
            latents = largest_of_rows(pre.detach(), options.k)
            each = torch.full_like(x[:, 0], latents.shape[1])
            return self._rebuilt(latents.flatten(), pre.gather(1, latents).flatten(), each)
        rows, latents = largest_of_batch(pre.detach(), options.k)
        each = torch.bincount(rows, minlength=len(x)).to(x.dtype)
        return self._rebuilt(latents, pre[rows, latents], each)

    def pre(
        self, x: Float[Tensor, "T d"], latents: Int[Tensor, " m"] | None = None
    ) -> Float[Tensor, "T m"]:
        """The pre-activations of all latents, or of some."""
        if self.pursues:
            atoms = self.decoder if latents is None else self.decoder[latents]
            return (x - self.bias) @ atoms.T
        rows: Tensor = self.encoder
        bias: Tensor = self.encoder_bias
        if latents is not None:
            rows, bias = rows[latents], bias[latents]
        return functional.linear(x, rows, bias - rows @ self.bias)

    def explained(
        self, x: Float[Tensor, "T d"], among: Int[Tensor, " m"], k: int
    ) -> Float[Tensor, "T d"]:
        """What the k strongest of the latents `among` add to each row."""
        pre = self.pre(x, among)
        places = largest_of_rows(pre.detach(), k)
        kept = torch.zeros_like(pre).scatter(1, places, pre.gather(1, places).relu())
        return kept @ self.decoder[among]

    def _rebuilt(
        self,
        latents: Int[Tensor, " p"],
        values: Float[Tensor, " p"],
        each: Float[Tensor, " T"],
    ) -> Passed:
        """Σ value · decoder row, over the `each` latents of a row, which lie one after the other,
        where values are positive."""
        values, ends = values.relu(), each.long().cumsum(0)
        total = functional.embedding_bag(
            latents, self.decoder, ends - each.long(), mode="sum", per_sample_weights=values
        )
        active = values > 0
        return Passed(total + self.bias, latents[active], values[active])

    @torch.no_grad()
    def after_step(self, passed: Passed) -> Bool[Tensor, " n"]:
        """Decoder rows to length one, and BatchTopK's threshold along; which latents were
        active."""
        self.decoder.div_(self.decoder.norm(dim=-1, keepdim=True).clamp_min(1e-12))
        if self.options.architecture == "batchtopk" and len(passed.values):
            least = passed.values.min()
            first = float(self.least) == 0.0
            self.least.copy_(least if first else (1 - _SLOW) * self.least + _SLOW * least)
        fired = torch.zeros(self.options.latents, dtype=torch.bool, device=self.bias.device)
        fired[passed.latents] = True
        return fired

    @torch.no_grad()
    def as_sae(self, units: RowUnits, point: HookPoint, **card: object) -> SAE:
        """The SAE in the units of the states: mean and scale go into its biases, so that an
        activation is a length in the stream."""
        options, scale = self.options, units.scale
        rest: dict[str, Any] = {
            "W_dec": self.decoder.detach().clone(),
            "b_dec": units.mean + self.bias.cpu() / scale,
            "layer": point.layer,
            "site": point.site,
            **card,
        }
        if self.pursues:
            rule = Pursuit(
                residual_threshold=0.0, max_iterations=options.k, stop_on_duplicate_support=False
            )
            return SAE.of("matching_pursuit", pursuit=rule, **rest)
        rest |= {"W_enc": self.encoder.T.clone(), "b_enc": self.encoder_bias / scale}
        if options.architecture == "topk":
            return SAE.of("topk", k=options.k, **rest)
        threshold = (
            self.log_threshold.exp() / scale
            if options.architecture == "jumprelu"
            else (self.least / scale).expand(options.latents).clone()
        )
        return SAE.of("jumprelu", threshold=threshold, **rest)
