"""One registered version of an artefact, and how a reference names it."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

from steer.artefacts.control_vector import Card
from steer.artefacts.kinds import ArtefactKind
from steer.errors import UnknownArtefact

_REF = re.compile(r"(?P<name>[A-Za-z0-9][A-Za-z0-9._-]{0,127})(@(?P<hash>[0-9a-f]{6,64}))?")


@dataclass(frozen=True)
class Entry:
    """A version of a named artefact. `card.name` is `name`; times are in UTC. `removed_at` is set
    for one that was removed and can still be restored."""

    kind: ArtefactKind
    name: str
    version: int
    sha256: str
    size_bytes: int
    card: Card
    created_at: datetime
    removed_at: datetime | None = None

    @property
    def id(self) -> str:
        """A reference to exactly this content: `name@hash`."""
        return f"{self.name}@{self.sha256[:12]}"


class Ref(NamedTuple):
    """A parsed reference: a name, and the beginning of a hash or nothing for the newest."""

    name: str
    hash_prefix: str = ""

    @property
    def newest(self) -> bool:
        return not self.hash_prefix


def parse_ref(kind: str, ref: str) -> Ref:
    """`name` or `name@hash` (6 to 64 hex digits) in its parts.

    Raises `UnknownArtefact`: what is no name cannot have been registered.
    """
    match = _REF.fullmatch(ref)
    if match is None:
        raise UnknownArtefact(
            f"{ref!r} cannot be a {kind}: a reference is a name of letters, digits, '.', '_' and "
            "'-', optionally followed by '@' and at least 6 hex digits of the hash",
            code=f"unknown_{kind}",
        )
    return Ref(match["name"], match["hash"] or "")
