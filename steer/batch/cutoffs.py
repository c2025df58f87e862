"""The encoders of TopK SAEs on one device: each lies there once, however many tables rank by it."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch

from steer.edits import TopKCutoff


class DeviceCutoffs:
    """Guarantees: what `of` gives is float32, in rows without gaps, and is kept as long as somebody
    holds it and no longer."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._held: WeakValueDictionary[str, TopKCutoff] = WeakValueDictionary()

    def of(self, cutoff: TopKCutoff) -> TopKCutoff:
        """`cutoff` with its tensors on the device."""
        found = self._held.get(cutoff.identity)
        if found is None:
            found = self._held[cutoff.identity] = TopKCutoff(
                cutoff.identity,
                cutoff.read.to(self.device, torch.float32).contiguous(),
                cutoff.bias.to(self.device, torch.float32).contiguous(),
                cutoff.k,
                cutoff.measure,
            )
        return found
