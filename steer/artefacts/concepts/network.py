"""From the states of a token at several layers to a code, by a small network."""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from jaxtyping import Float
from torch import Tensor, nn

STEPS = 300
"""Of training, each on all examples."""
_HIDDEN = 512
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


@dataclass(frozen=True, eq=False)
class CodeNetwork:
    """A network with one hidden layer, whose outputs' signs are a code; inputs are put at `mean`
    and `scale` first. All float32."""

    mean: Float[Tensor, " width"]
    scale: Float[Tensor, " width"]
    hidden_weight: Float[Tensor, "hidden width"]
    hidden_bias: Float[Tensor, " hidden"]
    code_weight: Float[Tensor, "dimensions hidden"]
    code_bias: Float[Tensor, " dimensions"]

    @staticmethod
    def fit(
        inputs: Float[Tensor, "N width"], codes: Float[Tensor, "N dimensions"], seed: int = 0
    ) -> CodeNetwork:
        """Fits every channel's sign by its log-loss; the same from the same inputs and `seed`."""
        training = CodeTraining(inputs, codes, seed)
        for _ in range(STEPS):
            training.step()
        return training.network()

    @property
    def tensors(self) -> dict[str, Tensor]:
        """As files name them."""
        return {one.name: getattr(self, one.name) for one in fields(self)}

    def code(self, inputs: Float[Tensor, "N width"]) -> Float[Tensor, "N dimensions"]:
        """±1."""
        given = (inputs - self.mean) / self.scale
        hidden = nn.functional.gelu(
            nn.functional.linear(given, self.hidden_weight, self.hidden_bias)
        )
        found = nn.functional.linear(hidden, self.code_weight, self.code_bias)
        return torch.where(found > 0, 1.0, -1.0)


class CodeTraining:
    """Training of one network, which may be left and taken up between two steps: all of it is in
    `optimiser`. Nothing is drawn but the start."""

    def __init__(
        self, inputs: Float[Tensor, "N width"], codes: Float[Tensor, "N dimensions"], seed: int
    ) -> None:
        self._mean = inputs.mean(0)
        self._scale = inputs.std(0).clamp_min(1e-6)
        self._given, self._wanted = (inputs - self._mean) / self._scale, (codes > 0).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._hidden = nn.Linear(inputs.shape[1], _HIDDEN)
            self._code = nn.Linear(_HIDDEN, codes.shape[1])
        parameters = [*self._hidden.parameters(), *self._code.parameters()]
        self.optimiser = torch.optim.AdamW(parameters, lr=_RATE, weight_decay=_DECAY)

    def step(self) -> None:
        """One step on all examples."""
        with torch.enable_grad():
            self.optimiser.zero_grad()
            loss = nn.functional.binary_cross_entropy_with_logits(
                self._code(nn.functional.gelu(self._hidden(self._given))), self._wanted
            )
            loss.backward()  # type: ignore[no-untyped-call]
            self.optimiser.step()

    def network(self) -> CodeNetwork:
        """As it is now."""
        held = (self._hidden.weight, self._hidden.bias, self._code.weight, self._code.bias)
        return CodeNetwork(self._mean, self._scale, *(one.detach().clone() for one in held))
