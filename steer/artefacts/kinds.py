"""The kinds of artefact there are: one table, which every list, route and option is made from.

It holds names alone, and loads neither torch nor an artefact, so that the command line can make its
options of it. A new kind is a class, a row here and its names in the two types beside it, and a
reader in `steer.formats.canonical`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, Literal

ArtefactKind = Literal["vector", "low_rank", "sae", "lens", "affine", "detector", "oracle", "probe"]
"""A kind, as cards, the catalogue and error codes (`unknown_lens`) call it."""

Plural = Literal["vectors", "adapters", "saes", "lenses", "maps", "detectors", "oracles", "probes"]
"""Artefacts of one kind, as routes and counts call them."""


@dataclass(frozen=True)
class KindRow:
    """One kind of artefact.

    `shelf` is the field of a `MemoryLibrary` that holds such artefacts, and their folder in a
    library that is shipped; `title` heads them where people read; `home` is where their class is,
    as `module:name`. `exported`: whether it also comes in others' formats and with some of its
    layers alone (`steer.formats.exporting`); every kind comes as its canonical file.
    """

    name: ArtefactKind
    plural: Plural
    shelf: str
    title: str
    home: str
    exported: bool = False

    def artefact_class(self) -> type[Any]:
        """The class of such artefacts, imported now; see `steer.artefacts.artefact.Artefact`."""
        module, _, name = self.home.partition(":")
        found: type[Any] = getattr(import_module(module), name)
        return found


KINDS = (
    KindRow(
        "vector",
        "vectors",
        shelf="vectors",
        title="Vectors",
        home="steer.artefacts.control_vector:ControlVector",
        exported=True,
    ),
    KindRow(
        "low_rank",
        "adapters",
        shelf="low_ranks",
        title="Adapters",
        home="steer.artefacts.control_vector:LowRankAdapter",
    ),
    KindRow("sae", "saes", shelf="saes", title="SAEs", home="steer.artefacts.sae.base:SAE"),
    KindRow("lens", "lenses", shelf="lenses", title="Lenses", home="steer.artefacts.lens:Lens"),
    KindRow("affine", "maps", shelf="maps", title="Maps", home="steer.artefacts.affine:AffineMap"),
    KindRow(
        "detector",
        "detectors",
        shelf="detectors",
        title="Detectors",
        home="steer.artefacts.detector:Detector",
    ),
    KindRow(
        "oracle", "oracles", shelf="oracles", title="Oracles", home="steer.artefacts.oracle:Oracle"
    ),
    KindRow(
        "probe",
        "probes",
        shelf="probes",
        title="Probes",
        home="steer.artefacts.concepts.probe:ConceptProbe",
    ),
)

NAMED: Mapping[ArtefactKind, KindRow] = {row.name: row for row in KINDS}
"""The rows by their kind's name."""

PLURALS: Mapping[Plural, KindRow] = {row.plural: row for row in KINDS}
"""The rows by the word in routes."""

_HOMES = {row.home: row for row in KINDS}


def row_of(artefact: type[Any]) -> KindRow:
    """The row of a class of artefacts; raises `KeyError` for a class that has none."""
    return _HOMES[f"{artefact.__module__}:{artefact.__qualname__}"]
