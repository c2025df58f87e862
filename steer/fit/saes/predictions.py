"""What the model says on rebuilt states, beside what it says on its own (2405.12241)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

from steer.engines.base import Engine
from steer.engines.gradients import DifferentiableModel, differentiable
from steer.errors import SteerError
from steer.fit.data.texts import Tokens
from steer.fit.saes.network import RowUnits, SAENetwork
from steer.fit.saes.options import SAEOptions
from steer.model import HookPoint


class ModelPredictions:
    """Gradients of KL(p ‖ p̂): p is what the model predicts on `texts`, p̂ what it predicts where
    the states at `point` are what the SAE rebuilds. The first `skip` tokens keep their states.

    Raises `Unsupported` (`no_gradients`), `SteerError` (`no_prompts`).
    """

    def __init__(
        self,
        engine: Engine,
        point: HookPoint,
        texts: Sequence[Tokens],
        options: SAEOptions,
        *,
        skip: int = 1,
    ) -> None:
        self._engine, self._point, self._options = differentiable(engine), point, options
        self._texts = [text for text in texts if len(text) > skip + 1]
        self._skip = skip
        if not self._texts:
            raise SteerError(
                f"no text is longer than {skip + 1} tokens: there is nothing to predict",
                code="no_prompts",
            )

    def learn(self, network: SAENetwork, units: RowUnits, step: int) -> float:
        """Adds the gradients for the texts of this step; the divergence in nats a token."""
        count = self._options.prediction_texts
        start = step // self._options.prediction_every * count
        group = [self._texts[(start + n) % len(self._texts)] for n in range(count)]

        def rebuilt(x: Tensor) -> Tensor:
            kept = x[:, : self._skip]
            states = x[:, self._skip :].float().flatten(0, 1).to(network.bias.device)
            mean = units.mean.to(states.device)
            rows = network((states - mean) * units.scale).rebuilt / units.scale + mean
            return torch.cat([kept, rows.unflatten(0, (len(x), -1)).to(x)], 1)

        def work(model: DifferentiableModel) -> float:
            with torch.no_grad():
                own = model.run(group, edits={}).logits.log_softmax(-1)
            found = model.run(group, edits={self._point: rebuilt}).logits.log_softmax(-1)
            lengths = torch.tensor([len(text) for text in group], device=found.device)
            places = torch.arange(found.shape[1], device=found.device)
            counted = (places >= self._skip) & (places < lengths[:, None])
            divergence = functional.kl_div(found, own, reduction="none", log_target=True).sum(-1)
            loss = divergence[counted].mean()
            (self._options.prediction_weight * loss).backward()  # type: ignore[no-untyped-call]
            return float(loss.detach())

        return self._engine.differentiate(work)
