"""The encoders of SAEs whose features compete, on one device: each lies there once, however many
tables ask it."""

from __future__ import annotations

from weakref import WeakValueDictionary

import torch

from steer.edits import Encoder


class DeviceEncoders:
    """Guarantees: what `of` gives is kept as long as somebody holds it and no longer."""

    def __init__(self, device: torch.device | str) -> None:
        self.device = torch.device(device)
        self._held: WeakValueDictionary[str, Encoder] = WeakValueDictionary()

    def of(self, encoder: Encoder) -> Encoder:
        """`encoder` with its tensors on the device."""
        found = self._held.get(encoder.identity)
        if found is None:
            found = self._held[encoder.identity] = encoder.on(self.device)
        return found
