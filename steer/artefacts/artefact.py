"""What every kind of artefact is and does, whatever it holds."""

from __future__ import annotations

from dataclasses import Field
from typing import Any, ClassVar, Protocol, Self

from steer.artefacts.control_vector import Card


class Artefact(Protocol):
    """A frozen dataclass with a card, whose identity is the hash of its canonical file.

    Guarantees: `from_bytes` reads what `to_bytes` wrote, and what it reads has the same hash. It
    trusts its bytes: files of others go through `steer.formats`.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def card(self) -> Card: ...

    @property
    def sha256(self) -> str:
        """The hash of the canonical file, in 64 hex digits."""
        ...

    def to_bytes(self) -> bytes:
        """The canonical file: safetensors, with the card but its name."""
        ...

    @classmethod
    def from_bytes(cls, data: bytes, *, name: str = "") -> Self:
        """The artefact in a canonical file; `name` is its card's name."""
        ...
