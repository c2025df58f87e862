"""What methods that need derivatives ask of an engine; not every engine has it.

Serving and differentiating share one model, so work is done in the engine's own thread between two
steps: keep a piece of work small (one training step, one Jacobian), and other requests go on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, TypeAlias, TypeVar, cast

import torch
from torch import Tensor

from steer.artefacts.lora import LoraPart
from steer.engines.base import Engine
from steer.errors import Unsupported
from steer.model import HookPoint

Result = TypeVar("Result")
Edit: TypeAlias = Callable[[Tensor], Tensor]
"""Takes the states at one hook point, `[rows, columns, width]`, and returns the new ones."""


@dataclass(frozen=True)
class Traced:
    """One differentiable pass. Rows are padded on the right, so that column n is position n.

    `logits` `[rows, columns, vocab]` and `states` `[rows, columns, width]` are float32 and carry
    gradients back to whatever the edits brought in.
    """

    logits: Tensor
    states: Mapping[HookPoint, Tensor]


class DifferentiableModel(Protocol):
    """The model inside `differentiate`; its own weights are constants there."""

    @property
    def device(self) -> torch.device: ...

    def linear_modules(self) -> Mapping[str, tuple[int, int]]:
        """The linear modules inside the decoder blocks, each with its inputs and outputs."""

    def run(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        edits: Mapping[HookPoint, Edit],
        capture: Sequence[HookPoint] = (),
        lora: Mapping[str, LoraPart] | None = None,
    ) -> Traced:
        """One forward pass over whole prompts; states are read after the edit at their point. With
        `lora` modules of these names add its parts, through which gradients flow too."""

    def unembed(self, states: Tensor) -> Tensor:
        """`Engine.unembed`, through which gradients flow back to `states`."""


class DifferentiableEngine(Protocol):
    """An engine that can run its model with autograd on: its capabilities say `gradients`."""

    def differentiate(self, work: Callable[[DifferentiableModel], Result]) -> Result:
        """The result of `work`, run between two steps of the engine."""


def differentiable(engine: Engine) -> DifferentiableEngine:
    """`engine`, if it has gradients. Raises `Unsupported` (`no_gradients`)."""
    if engine.capabilities.gradients:
        return cast("DifferentiableEngine", engine)
    raise Unsupported(
        f"the {engine.capabilities.engine} engine cannot differentiate its model: fit on the "
        "transformers engine; the result serves on every engine",
        code="no_gradients",
    )
