"""An engine whose states hold two planted concepts, and texts that say which."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from steer.engines.base import Captured, CaptureRequest
from steer.engines.fake.engine import FakeEngine
from steer.model import HookPoint

COLOURS, SHAPES = ("red", "blue", "green", "white"), ("cube", "ball", "cone")


class PlantedEngine(FakeEngine):
    """The state of token 20 c + s is a direction of colour c, one of shape s, and noise of the
    token before it."""

    def capture(self, request: CaptureRequest) -> list[Captured]:
        assert {point.layer for point in request.points} <= set(range(6))
        return [
            Captured({point: self._planted(prompt, point) for point in request.points})
            for prompt in request.prompts
        ]

    def _planted(self, prompt: Sequence[int], point: HookPoint) -> Tensor:
        drawn = torch.Generator().manual_seed(point.layer)
        colours, shapes = torch.randn(10, 16, generator=drawn), torch.randn(10, 16, generator=drawn)
        own = torch.Generator().manual_seed(1000 * point.layer + prompt[0])
        noise = 0.3 * torch.randn(16, generator=own)
        colour, shape = divmod(prompt[-1], 20)
        return (5.0 + colours[colour] + shapes[shape] + noise)[None]


def planted_example(n: int) -> dict[str, Any]:
    colour, shape = n % len(COLOURS), n // 4 % len(SHAPES)
    pairs = {"colour": COLOURS[colour], "shape": SHAPES[shape]}
    return {"tokens": [n, 20 * colour + shape], "pairs": pairs}
