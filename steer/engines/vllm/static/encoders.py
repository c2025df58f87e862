"""The encoders of TopK SAEs whose features running plans clamp, as kernels find them.

An encoder is as large as its SAE and may come at any time, so it does not lie in a buffer of fixed
size. A table that never moves holds where it lies: the kernel reads the address there, and a graph
that was captured before the SAE was known replays with it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from steer.artefacts.sae.encoders import TopKEncoder
from steer.batch.encoders import DeviceEncoders

# Fields of an encoder's entry: the addresses of `read` and `bias`, the latents, k, the measure, and
# whether they are ranked by magnitude.
READ, BIAS, LATENTS, K, MEASURE, SIGNED = range(6)
ENCODER_FIELDS = 8


@dataclass
class _Entry:
    number: int
    encoder: TopKEncoder
    references: int = 0


class Encoders:
    """Up to `capacity` encoders at a time; entry 0 is none.

    Assumes: what `take` writes reaches the device in the order of the steps (one stream), on which
    the memory of encoders that nobody holds any more is used again.
    """

    def __init__(self, capacity: int, on_device: DeviceEncoders) -> None:
        self.table = torch.zeros(
            capacity + 1, ENCODER_FIELDS, dtype=torch.int64, device=on_device.device
        )
        self._on_device = on_device
        self._held: dict[str, _Entry] = {}
        self._free = list(range(capacity, 0, -1))

    def take(self, encoder: TopKEncoder) -> int:
        """The number of `encoder`; give it back as often as it was taken."""
        entry = self._held.get(encoder.identity)
        if entry is None:
            entry = self._held[encoder.identity] = self._write(encoder)
        entry.references += 1
        return entry.number

    def give_back(self, identity: str) -> None:
        """Gives back one reference to an encoder."""
        entry = self._held[identity]
        entry.references -= 1
        if entry.references == 0:
            del self._held[identity]
            self._free.append(entry.number)

    def _write(self, encoder: TopKEncoder) -> _Entry:
        if not encoder.rows.plain:
            # Kernels read float32: such rows lie on the device beside those that Python reads.
            plain = f"{encoder.identity} in float32"
            encoder = replace(encoder, identity=plain, rows=encoder.rows.in_float32())
        held = self._on_device.of(encoder)
        assert isinstance(held, TopKEncoder)
        entry, rows = _Entry(self._free.pop(), held), held.rows
        fields = [rows.read.data_ptr(), rows.bias.data_ptr(), held.latents, held.k]
        fields += [int(rows.measure), int(held.signed)]
        row = torch.tensor(fields, dtype=torch.int64)
        self.table[entry.number, : len(fields)] = row.to(self.table.device)
        return entry
