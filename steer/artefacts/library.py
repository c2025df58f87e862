"""Where a plan finds the artefacts its spec names."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol, TypeVar, runtime_checkable

from steer.artefacts.affine import AffineMap
from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.lens import Lens
from steer.artefacts.oracle import Oracle
from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.labels import FeatureLabel
from steer.errors import UnknownArtefact

Held = TypeVar("Held")


class Library(Protocol):
    """Artefacts by reference: a name (its newest version) or `name@hash`.

    Every method raises `UnknownArtefact` for a reference it cannot resolve.
    """

    def vector(self, ref: str) -> ControlVector: ...

    def sae(self, ref: str) -> SAE: ...

    def low_rank(self, ref: str) -> LowRankAdapter: ...

    def lens(self, ref: str) -> Lens: ...

    def affine(self, ref: str) -> AffineMap: ...

    def detector(self, ref: str) -> Detector: ...

    def oracle(self, ref: str) -> Oracle: ...

    def probe(self, ref: str) -> ConceptProbe: ...


@runtime_checkable
class DatedLibrary(Library, Protocol):
    """A library that knows when its names may have come to mean something else, so that whoever
    has looked one up need not do it again until then."""

    @property
    def local(self) -> bool:
        """Whether `state` and `keep` are answered by this machine, and so at once."""

    def state(self) -> int:
        """A number that is another one after every change of what a name means."""

    def keep(self, sha256s: Iterable[str]) -> None:
        """What has these contents was found here and is still in use, without being asked for."""


@runtime_checkable
class LabellingLibrary(Library, Protocol):
    """A library that knows labels of features beside those in the SAEs themselves."""

    def labels(self, ref: str) -> Mapping[int, FeatureLabel]: ...


@runtime_checkable
class ListedLibrary(Library, Protocol):
    """A library that can say which vectors it has."""

    def vector_names(self, *, width: int, limit: int) -> tuple[str, ...]:
        """The first `limit` names of vectors of this width, in order."""


def labels_of(library: Library, ref: str) -> Mapping[int, FeatureLabel]:
    """What the features of the SAE that `ref` names are called. Raises `UnknownArtefact`."""
    return library.labels(ref) if isinstance(library, LabellingLibrary) else library.sae(ref).labels


@dataclass(frozen=True)
class MemoryLibrary:
    """Artefacts held in dictionaries: for notebooks and tests."""

    vectors: Mapping[str, ControlVector] = field(default_factory=dict)
    saes: Mapping[str, SAE] = field(default_factory=dict)
    low_ranks: Mapping[str, LowRankAdapter] = field(default_factory=dict)
    lenses: Mapping[str, Lens] = field(default_factory=dict)
    maps: Mapping[str, AffineMap] = field(default_factory=dict)
    detectors: Mapping[str, Detector] = field(default_factory=dict)
    oracles: Mapping[str, Oracle] = field(default_factory=dict)
    probes: Mapping[str, ConceptProbe] = field(default_factory=dict)

    def vector(self, ref: str) -> ControlVector:
        return _named(self.vectors, ref, "vector")

    def vector_names(self, *, width: int, limit: int) -> tuple[str, ...]:
        fitting = (name for name, one in self.vectors.items() if one.card.width == width)
        return tuple(sorted(fitting)[:limit])

    def sae(self, ref: str) -> SAE:
        return _named(self.saes, ref, "sae")

    def low_rank(self, ref: str) -> LowRankAdapter:
        return _named(self.low_ranks, ref, "low_rank")

    def lens(self, ref: str) -> Lens:
        return _named(self.lenses, ref, "lens")

    def affine(self, ref: str) -> AffineMap:
        return _named(self.maps, ref, "affine")

    def detector(self, ref: str) -> Detector:
        return _named(self.detectors, ref, "detector")

    def oracle(self, ref: str) -> Oracle:
        return _named(self.oracles, ref, "oracle")

    def probe(self, ref: str) -> ConceptProbe:
        return _named(self.probes, ref, "probe")


def _named(held: Mapping[str, Held], ref: str, kind: str) -> Held:
    if ref in held:
        return held[ref]
    known = ", ".join(sorted(held)) or "none"
    raise UnknownArtefact(
        f"there is no {kind} named {ref!r}; known: {known}", code=f"unknown_{kind}"
    )
