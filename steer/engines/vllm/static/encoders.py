"""The encoders of TopK SAEs whose features running plans clamp, as kernels find them.

An encoder is as large as its SAE and may come at any time, so it does not lie in a buffer of fixed
size. A table that never moves holds where it lies: the kernel reads the address there, and a graph
that was captured before the SAE was known replays with it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from steer.batch.cutoffs import DeviceCutoffs
from steer.edits import TopKCutoff

# Fields of an encoder's entry: the addresses of `read` and `bias`, the latents, k, and the measure.
READ, BIAS, LATENTS, K, MEASURE = range(5)
ENCODER_FIELDS = 8


@dataclass
class _Entry:
    number: int
    cutoff: TopKCutoff
    references: int = 0


class Encoders:
    """Up to `capacity` encoders at a time; entry 0 is none.

    Assumes: what `take` writes reaches the device in the order of the steps (one stream), on which
    the memory of encoders that nobody holds any more is used again.
    """

    def __init__(self, capacity: int, cutoffs: DeviceCutoffs) -> None:
        self.table = torch.zeros(
            capacity + 1, ENCODER_FIELDS, dtype=torch.int64, device=cutoffs.device
        )
        self._cutoffs = cutoffs
        self._held: dict[str, _Entry] = {}
        self._free = list(range(capacity, 0, -1))

    def take(self, cutoff: TopKCutoff) -> int:
        """The number of the encoder of `cutoff`; give it back as often as it was taken."""
        entry = self._held.get(cutoff.identity)
        if entry is None:
            entry = self._held[cutoff.identity] = self._write(self._cutoffs.of(cutoff))
        entry.references += 1
        return entry.number

    def give_back(self, identity: str) -> None:
        """Gives back one reference to an encoder."""
        entry = self._held[identity]
        entry.references -= 1
        if entry.references == 0:
            del self._held[identity]
            self._free.append(entry.number)

    def _write(self, cutoff: TopKCutoff) -> _Entry:
        entry = _Entry(self._free.pop(), cutoff)
        fields = [cutoff.read.data_ptr(), cutoff.bias.data_ptr(), len(cutoff.bias), cutoff.k]
        fields.append(int(cutoff.measure))
        row = torch.tensor(fields, dtype=torch.int64)
        self.table[entry.number, : len(fields)] = row.to(self.table.device)
        return entry
