"""How far a fit has got, as tensors in a file beside the journal: it goes on from there to the bit.

What is worked out after the newest bookmark is worked out again, in the same order and batches, so
that what comes out is the same wherever the work was ended.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from steer.engines.base import Engine
from steer.engines.journal import bookmark_of
from steer.errors import StorageError

_SHARE = 20
"""Work lasts so many times as long as the bookmark before it took to write: large ones are rare."""


class Bookmark:
    """The newest bookmark of one piece of work; nothing is kept where the engine keeps no journal.

    Guarantees: the file is replaced whole, and one that a crash spoilt counts as none.
    """

    def __init__(self, engine: Engine, what: Any) -> None:
        """`what`, plain values, is all that the work depends on besides engine and model."""
        self._path: Path | None = bookmark_of(engine, what)
        self._due = float("-inf")

    def read(self) -> dict[str, Tensor]:
        """The tensors of the bookmark; none where there is no bookmark."""
        if self._path is None:
            return {}
        try:
            return safetensors.torch.load(self._path.read_bytes())
        except (OSError, SafetensorError):
            return {}

    def write(self, tensors: Callable[[], Mapping[str, Tensor]]) -> None:
        """Replaces the bookmark by `tensors`, unless the last one was too short a time ago. Raises
        `StorageError`."""
        started = time.monotonic()
        if self._path is None or started < self._due:
            return
        whole = {name: one.detach().cpu().contiguous() for name, one in tensors().items()}
        fresh = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            fresh.write_bytes(safetensors.torch.save(whole))
            fresh.replace(self._path)
        except OSError as error:
            fresh.unlink(missing_ok=True)
            # Without its folder: a client may read this.
            raise StorageError(
                f"how far the fit has got cannot be kept in {self._path.name!r}: "
                f"{error.strerror}; make room on the disk, or let it be written"
            ) from error
        ended = time.monotonic()
        self._due = ended + _SHARE * (ended - started)


def training_state(optimiser: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The parameters of `optimiser` and all that it keeps of each."""
    found = {}
    for number, parameter in enumerate(_parameters(optimiser)):
        found[f"{number}"] = parameter
        for name, value in optimiser.state[parameter].items():
            found[f"{number}.{name}"] = torch.as_tensor(value)
    return found


def resume_training(optimiser: torch.optim.Optimizer, state: Mapping[str, Tensor]) -> None:
    """Puts `training_state` back, in place."""
    for number, parameter in enumerate(_parameters(optimiser)):
        with torch.no_grad():
            parameter.copy_(state[f"{number}"])
        for key, value in state.items():
            owner, _, name = key.partition(".")
            if owner == str(number) and name:
                # Adam counts its steps on the CPU, wherever the parameter is.
                place = "cpu" if name == "step" else parameter.device
                optimiser.state[parameter][name] = value.to(place)


class FallingRates:
    """The rates of an optimiser, falling from what they are to 0 in a line over `steps`."""

    def __init__(self, optimiser: torch.optim.Optimizer, steps: int) -> None:
        self._groups = [(group, group["lr"]) for group in optimiser.param_groups]
        self._steps = steps

    def at(self, step: int) -> None:
        """Sets those of `step`, from 0."""
        for group, rate in self._groups:
            group["lr"] = rate * (1 - step / self._steps)


def _parameters(optimiser: torch.optim.Optimizer) -> Iterator[Tensor]:
    for group in optimiser.param_groups:
        yield from group["params"]
