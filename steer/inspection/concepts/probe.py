"""From the states of a token at several layers to a code, by a small network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn

_HIDDEN = 512
_STEPS = 300
_RATE = 2e-3
_DECAY = 1e-2


def summed_centroids(
    states: Float[Tensor, "layers width"], clusters: int, seed: int = 0
) -> Float[Tensor, " width"]:
    """The sum of the centroids of a token's states, layers that say the same being one cluster, so
    that many like layers do not outweigh a few others. float32."""
    from sklearn.cluster import KMeans  # noqa: PLC0415 (slow import)

    rows = states.double().cpu()
    count = min(clusters, len({tuple(row) for row in rows.tolist()}))
    found = KMeans(count, n_init=4, random_state=seed).fit(rows.numpy())
    return torch.from_numpy(found.cluster_centers_).sum(0).float()


@dataclass(frozen=True)
class CodeProbe:
    """A network with one hidden layer, whose outputs' signs are a code; inputs are put at `mean`
    and `scale` first."""

    mean: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    network: nn.Module

    @staticmethod
    def fit(
        inputs: Float[Tensor, "N width"], codes: Float[Tensor, "N dimensions"], seed: int = 0
    ) -> CodeProbe:
        """Fits every channel's sign by its log-loss; the same from the same inputs and `seed`."""
        mean = inputs.mean(0)
        scale = inputs.std(0).clamp_min(1e-6)
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(seed)
            network = nn.Sequential(
                nn.Linear(inputs.shape[1], _HIDDEN),
                nn.GELU(),
                nn.Linear(_HIDDEN, codes.shape[1]),
            )
            optimiser = torch.optim.AdamW(network.parameters(), lr=_RATE, weight_decay=_DECAY)
            given, wanted = (inputs - mean) / scale, (codes > 0).float()
            for _ in range(_STEPS):
                optimiser.zero_grad()
                loss = nn.functional.binary_cross_entropy_with_logits(network(given), wanted)
                loss.backward()  # type: ignore[no-untyped-call]
                optimiser.step()
        return CodeProbe(mean, scale, network.requires_grad_(requires_grad=False))

    def code(self, inputs: Float[Tensor, "N width"]) -> Float[Tensor, "N dimensions"]:
        """Codes of ±1."""
        with torch.no_grad():
            out: Tensor = self.network((inputs - self.mean) / self.scale)
        return torch.where(out > 0, 1.0, -1.0)
