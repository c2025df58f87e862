"""What blocks make of states by themselves: asked of the workers, and proved first.

A worker runs a block as it ran in a trial pass, without a cache and without a batch around it.
Whether that is what it does in a pass is seen from prompts of one token: what a capture finds at
both hook points must be what the block makes of the one at the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain

import torch
from torch import Tensor

from steer.engines.base import Captured, CaptureRequest
from steer.engines.vllm.front.capturing import told
from steer.engines.vllm.front.drivers import Driver
from steer.engines.vllm.messages import pack, unpack
from steer.errors import Unsupported
from steer.model import HookPoint, ModelInfo

_TOKENS = 4
_TOLERANCE = 1e-3
_TOLERANCE_HALF = 3e-2
"""How far, relative to its length, what a block makes by itself may be from what it made in a pass,
in 32 bits and in 16."""


@dataclass
class CarriedStates:
    """Those of one engine; `capture` is its own."""

    driver: Driver
    info: ModelInfo
    capture: Callable[[CaptureRequest], list[Captured]]
    _proved: set[tuple[HookPoint, HookPoint]] = field(default_factory=set)

    def __call__(
        self, source: HookPoint, target: HookPoint, states: Tensor, channels: range | None
    ) -> Tensor:
        """See `Engine.carry`."""
        if (source, target) not in self._proved:
            self._prove(source, target)
            self._proved.add((source, target))
        return self._carried(source, target, states, channels)

    def _carried(
        self, source: HookPoint, target: HookPoint, states: Tensor, channels: range | None
    ) -> Tensor:
        width = self.info.width(target.site) if channels is None else len(channels)
        ends = None if channels is None else (channels.start, channels.stop)
        asked = (source.layer, (source.site, target.site), pack(states), ends)
        found = told(chain(*self.driver.rpc("steer_carried", *asked)))
        return unpack(found[0]["made"], width)

    def _prove(self, source: HookPoint, target: HookPoint) -> None:
        """Raises `Unsupported` (`cannot_carry`) where a block does something else by itself."""
        step = max(1, self.info.vocab_size // _TOKENS)
        prompts = [(token,) for token in range(0, self.info.vocab_size, step)]
        captured = self.capture(CaptureRequest(prompts, (source, target)))
        before, after = (
            torch.cat([one.states[point] for one in captured]) for point in (source, target)
        )
        made = self._carried(source, target, before, None)
        allowed = _TOLERANCE if self.info.dtype == "float32" else _TOLERANCE_HALF
        far = (made - after).norm(dim=-1) > allowed * after.norm(dim=-1)
        if bool(far.any()):
            raise Unsupported(
                f"what the block makes at {target} of {source} by itself is not what it makes in a "
                "pass of this vLLM, so it is not told: use the transformers engine",
                code="cannot_carry",
            )
