"""What compiling draws on: artefacts, the model's shape, and the model itself for texts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from torch import Tensor

from steer.artefacts.affine import AffineMap
from steer.artefacts.concepts.probe import ConceptProbe
from steer.artefacts.control_vector import ControlVector, LowRankAdapter
from steer.artefacts.detector import Detector
from steer.artefacts.lens import Lens
from steer.artefacts.library import Library
from steer.artefacts.oracle import Oracle
from steer.artefacts.sae.base import SAE
from steer.artefacts.token_direction import TokenDirections
from steer.errors import SteerError, Unsupported
from steer.formats.inline import decode_inline
from steer.model import HookPoint, ModelInfo
from steer.references import Reference
from steer.spec import InlineVector, Site, TokenVector

Found = TypeVar("Found")
Named: TypeAlias = ControlVector | SAE | LowRankAdapter | AffineMap | Lens | Detector
"""What a reference in a spec can stand for."""
EncodeText: TypeAlias = Callable[[str, HookPoint], Tensor]
"""A text and a hook point to its tokens' states `[tokens, width]`, by the model being served."""


@dataclass(frozen=True)
class Sources:
    """Where the parts of a plan come from."""

    library: Library
    model: ModelInfo
    encode_text: EncodeText | None = None
    directions: TokenDirections | None = None
    """The directions of the model's tokens; None where nobody knows its output matrix."""

    def named(self, reference: Reference, site: Site | None = None) -> Named:
        """What `reference` stands for, a token's directions at `site` (None: `resid_post`).

        Raises what the library or the vector's reader raises, with a pointer beside `reference`
        where that is known.
        """
        if isinstance(reference.ref, InlineVector):
            return decode_inline(reference.ref)
        if isinstance(reference.ref, TokenVector):
            return self._of_token(reference.ref, reference.param, site or "resid_post")
        # A library has one method for each kind, called like it.
        found: Named = getattr(self.library, reference.kind)(reference.ref)
        return found

    def _of_token(self, ref: TokenVector, at: str, site: Site) -> ControlVector:
        if self.directions is None:
            raise Unsupported(
                "a token's direction is made of the model's output matrix, and no model is at hand "
                "here: send the spec to an engine, or name a registered vector",
                code="no_unembedding",
                param=at + "/token",
            )
        try:
            lens = None if ref.lens is None else self.library.lens(ref.lens)
        except SteerError as error:
            raise error.at(at + "/lens") from None
        try:
            return self.directions.vector(ref.token, lens, site)
        except SteerError as error:
            if error.param in ("/token", "/lens"):
                error.param = at + error.param
            raise


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

    def probe(self, ref: str) -> ConceptProbe:
        return self._once("probe", ref, self._library.probe)

    def _once(self, kind: str, ref: str, find: Callable[[str], Found]) -> Found:
        if (kind, ref) not in self._found:
            self._found[kind, ref] = find(ref)
        found: Found = self._found[kind, ref]
        return found
