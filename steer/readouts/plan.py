"""Read-outs made ready: readers at hook points, and which tokens they read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from steer.artefacts.arming import ReadTokens
from steer.errors import Unsupported
from steer.model import HookPoint
from steer.readouts.readers import LensReader, Reader

EXACT = 1 << 24
"""Features and tokens travel as float32, which holds whole numbers below this exactly."""


@dataclass(frozen=True, eq=False)
class ReadoutPlan:
    """What is read of a request: one row of numbers for each token of `tokens` that was fed, the
    numbers of the readers in their order."""

    readers: tuple[Reader, ...]
    fields: tuple[str, ...]
    """The fields of its spec that ask for something."""
    tokens: ReadTokens = "generated"

    @property
    def kl(self) -> bool:
        """Whether the unsteered twin of the same tokens runs beside the request."""
        return "kl" in self.fields

    @cached_property
    def width(self) -> int:
        """Numbers of a token."""
        return sum(reader.width for reader in self.readers)

    @cached_property
    def points(self) -> frozenset[HookPoint]:
        return frozenset(reader.point for reader in self.readers)

    @property
    def reads_logits(self) -> bool:
        """Whether states are read through the model's head."""
        return any(isinstance(reader, LensReader) for reader in self.readers)

    @property
    def reads_prompt(self) -> bool:
        """Whether tokens of the prompt are read, so that they must be computed."""
        return self.tokens != "generated"

    def columns(self) -> Iterator[tuple[Reader, slice]]:
        """Each reader with its place in a row."""
        start = 0
        for reader in self.readers:
            yield reader, slice(start, start + reader.width)
            start += reader.width

    def wanted(self, prompt_length: int) -> tuple[int, int]:
        """The positions that are read: from the first to before the last."""
        return (
            prompt_length if self.tokens == "generated" else 0,
            prompt_length if self.tokens == "prompt" else EXACT,
        )

    def own(
        self, position: int, numbers: tuple[float, ...], prompt_length: int
    ) -> tuple[float, ...]:
        """Of the numbers read of the token at `position`, this plan's: what detectors need stands
        behind, and they may watch other tokens."""
        first, end = self.wanted(prompt_length)
        return numbers[: self.width] if first <= position < end else ()


def check_countable(what: str, count: int) -> None:
    """Raises `Unsupported` for numbers of `what` that do not travel exactly."""
    if count > EXACT:
        raise Unsupported(
            f"{what} has {count} entries, and read-outs name at most {EXACT}",
            code="unsupported",
        )
