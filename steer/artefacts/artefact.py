"""What every kind of artefact is and does, whatever it holds."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import Field
from typing import IO, Any, ClassVar, Protocol, Self, runtime_checkable

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


@runtime_checkable
class StoredArtefact(Protocol):
    """An artefact too large to be in memory as a whole: it is written in pieces, and most of it
    stays in its file."""

    def resident_bytes(self) -> int:
        """What it takes of the memory now."""
        ...

    def pieces(self) -> Iterator[bytes]:
        """The canonical file, piece by piece. May raise `FileFormatError` where what it is made of
        can no longer be read."""
        ...

    @classmethod
    def from_file(cls, stream: IO[bytes], *, name: str = "", sha256: str | None = None) -> Self:
        """The artefact in an open canonical file, which may be closed and removed then; with
        `sha256`, in one that is known to have this hash."""
        ...
