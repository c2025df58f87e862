"""The steps of a training, and checkpoints between them."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Protocol

import torch
from jaxtyping import Bool, Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from steer.fit.saes.loss import loss_of
from steer.fit.saes.network import RowUnits, SAENetwork
from steer.fit.saes.options import SAEOptions
from steer.fit.saes.rows import TrainingRows
from steer.registry.blobs.disk import disk_errors

_WARM_UP = 100
_FALL = 0.2
_SETTLED = 0.5
"""The share of the steps over which the penalty on active latents comes in."""
_FASTER = 10.0
"""How much faster JumpReLU's thresholds learn than the rest, so that they come to where as many
latents are active as was asked for."""
_CURVE = ("step", "rows", "unexplained", "active", "dead", "rate")


class Predictions(Protocol):
    """What else is learnt from than rows; see `predictions`."""

    def learn(self, network: SAENetwork, units: RowUnits, step: int) -> float:
        """Adds gradients to the network's; the divergence in nats."""
        ...


class Trainer:
    """One training run.

    Guarantees: on one machine the same rows and options give the same weights, wherever it was
    ended and begun again in between.
    """

    def __init__(
        self,
        rows: TrainingRows,
        units: RowUnits,
        options: SAEOptions,
        *,
        predictions: Predictions | None = None,
        device: str | None = None,
    ) -> None:
        self.rows, self.units, self.options = rows, units, options
        self.device = torch.device(device or "cpu")
        self.network = SAENetwork(rows.width, options).to(self.device)
        self.optimiser = torch.optim.Adam(
            [
                {"params": [one], "times": _FASTER if name == "log_threshold" else 1.0}
                for name, one in self.network.named_parameters()
            ],
            lr=options.rate,
        )
        self.steps = rows.steps(options.epochs, options.batch)
        # In a short training a latent has to come to life sooner.
        self.dead_after = min(options.dead_after, self.steps * options.batch // 10)
        self.done = 0
        self.idle = torch.zeros(options.latents, dtype=torch.int64, device=self.device)
        self.curve: list[tuple[float, ...]] = []
        self._predictions = predictions

    def dead(self) -> Bool[Tensor, " n"]:
        """The latents that so many tokens have passed without."""
        return self.idle >= self.dead_after

    def step(self) -> None:
        """One batch."""
        options = self.options
        numbers = self.rows.batch(self.done, options.batch, options.seed)
        x = self.units.of_states(self.rows.read(numbers)).to(self.device)
        labels = None
        if self.rows.labels is not None:
            labels = self.rows.labels[torch.from_numpy(numbers)].to(self.device)
        rate = options.rate * min(
            1.0,
            (self.done + 1) / min(_WARM_UP, self.steps),
            (self.steps - self.done) / max(1.0, _FALL * self.steps),
        )
        for group in self.optimiser.param_groups:
            group["lr"] = rate * group["times"]
        passed = self.network(x)
        dead = self.dead()
        loss = loss_of(
            self.network,
            x,
            passed,
            dead,
            labels,
            settled=min(1.0, self.done / (_SETTLED * self.steps)),
        )
        self.optimiser.zero_grad()
        loss.total.backward()  # type: ignore[no-untyped-call]
        if self._predictions is not None and self.done % options.prediction_every == 0:
            self._predictions.learn(self.network, self.units, self.done)
        self._keep_gradients_on_the_sphere()
        self.optimiser.step()
        fired = self.network.after_step(passed)
        self.idle = torch.where(fired, 0, self.idle + len(x))
        self.done += 1
        active = len(passed.latents) / len(x)
        self.curve.append(
            (
                float(self.done),
                float(self.done * len(x)),
                float(loss.unexplained.detach()),
                active,
                float(dead.sum()),
                rate,
            )
        )

    def _keep_gradients_on_the_sphere(self) -> None:
        """Takes from the decoder's gradient what would only change lengths, which are 1."""
        decoder = self.network.decoder
        if decoder.grad is not None:
            along = (decoder.grad * decoder.detach()).sum(-1, keepdim=True)
            decoder.grad -= along * decoder.detach()

    def save(self, path: Path, key: str) -> None:
        """Writes down where training is, under what it is a training of."""
        tensors = dict(self.network.state_dict())
        for number, state in self.optimiser.state_dict()["state"].items():
            tensors |= {f"adam.{number}.{name}": value for name, value in state.items()}
        tensors["idle"] = self.idle
        tensors["curve"] = torch.tensor(self.curve, dtype=torch.float64).reshape(-1, len(_CURVE))
        staged = path.with_name(f"{path.name}.part")
        with disk_errors("keeping a checkpoint"):
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file(
                {name: one.contiguous() for name, one in tensors.items()}, staged, {"key": key}
            )
            os.replace(staged, path)

    def restore(self, path: Path, key: str) -> bool:
        """Goes on from a checkpoint of this training; False where there is none."""
        if not path.exists():
            return False
        try:
            found = load_file(path)
        except SafetensorError:
            return False  # cut off: the work is done again
        if _key(path) != key:
            return False
        self.curve = [tuple(row) for row in found.pop("curve").tolist()]
        self.idle = found.pop("idle").to(self.device)
        moments: dict[int, dict[str, Tensor]] = {}
        for name in [one for one in found if one.startswith("adam.")]:
            _, number, what = name.split(".")
            moments.setdefault(int(number), {})[what] = found.pop(name)
        self.network.load_state_dict(found)
        groups = self.optimiser.state_dict()["param_groups"]
        self.optimiser.load_state_dict({"state": moments, "param_groups": groups})
        self.done = len(self.curve)
        return True


def _key(path: Path) -> str | None:
    with safe_open(path, "pt") as file:
        return (file.metadata() or {}).get("key")


def units_of(rows: TrainingRows, seed: int) -> RowUnits:
    """The units in which `rows` are trained on, from a sample of them."""
    sample: Float[Tensor, "n d"] = rows.sample(rows.trained, 1 << 15, seed)
    return RowUnits.of(sample)
