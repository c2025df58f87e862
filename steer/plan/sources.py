"""What compiling draws on: artefacts, the model's shape, and the model itself for texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from steer.artefacts.affine import AffineMap
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.lens import Lens
from steer.artefacts.library import Library
from steer.artefacts.oracle import Oracle
from steer.artefacts.sae.base import SAE
from steer.formats.inline import decode_inline
from steer.model import HookPoint, ModelInfo
from steer.references import Reference
from steer.spec import InlineVector

Found = TypeVar("Found")
Named: TypeAlias = ControlVector | SAE | LowRankAdapter | AffineMap | Detector
"""What a reference in a spec can stand for."""
EncodeText: TypeAlias = Callable[[str, HookPoint], Tensor]
"""A text and a hook point to its tokens' states `[tokens, width]`, by the model being served."""


@dataclass(frozen=True)
class Sources:
    """Where the parts of a plan come from."""

    library: Library
    model: ModelInfo
    encode_text: EncodeText | None = None

    def named(self, reference: Reference) -> Named:
        """What `reference` stands for; raises what the library or the vector's reader raises."""
        if isinstance(reference.ref, InlineVector):
            return decode_inline(reference.ref)
        # A library has one method for each kind, called like it.
        found: Named = getattr(self.library, reference.kind)(reference.ref)
        return found


class Snapshot:
    """A library in which every name keeps meaning what it meant when it was first asked for.

    `vectors` come before those of the library. A plan made of it is made of one state of each
    name, however the registry changes meanwhile; and nothing is looked up twice.
    """

    def __init__(self, library: Library, vectors: Mapping[str, ControlVector] | None) -> None:
        self._library = library
        self._found: dict[tuple[str, str], Any] = {
            ("vector", name): vector for name, vector in (vectors or {}).items()
        }

    def vector(self, ref: str) -> ControlVector:
        return self._once("vector", ref, self._library.vector)

    def sae(self, ref: str) -> SAE:
        return self._once("sae", ref, self._library.sae)

    def low_rank(self, ref: str) -> LowRankAdapter:
        return self._once("low_rank", ref, self._library.low_rank)

    def affine(self, ref: str) -> AffineMap:
        return self._once("affine", ref, self._library.affine)

    def lens(self, ref: str) -> Lens:
        return self._once("lens", ref, self._library.lens)

    def detector(self, ref: str) -> Detector:
        return self._once("detector", ref, self._library.detector)

    def oracle(self, ref: str) -> Oracle:
        return self._once("oracle", ref, self._library.oracle)

    def _once(self, kind: str, ref: str, find: Callable[[str], Found]) -> Found:
        if (kind, ref) not in self._found:
            self._found[kind, ref] = find(ref)
        found: Found = self._found[kind, ref]
        return found
