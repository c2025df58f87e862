"""Which encoder is asked about features that compete, and what of it each of them takes.

An encoder is as large as its SAE, or much of it: whoever needs it at one time holds the same one,
in the type that the SAE's file has.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar, cast
from weakref import WeakValueDictionary

import torch

from steer.artefacts.sae.base import SAE
from steer.artefacts.sae.encoders import GroupEncoder, LatentRows, PursuitEncoder, TopKEncoder
from steer.artefacts.sae.reads import Measure
from steer.artefacts.sae.storage.rows import KEPT_DTYPES
from steer.edits import Encoder
from steer.errors import IncompatibleArtefact, Unsupported
from steer.laws import CENTRED, COSINE, PRODUCT

MEASURES: dict[Measure, float] = {"product": PRODUCT, "cosine": COSINE, "centred": CENTRED}
"""What laws call what an SAE's features are read by."""

_held: WeakValueDictionary[str, Encoder | LatentRows] = WeakValueDictionary()


Held = TypeVar("Held", Encoder, LatentRows)


class Competing(NamedTuple):
    """The encoder that says how some features compete, and their columns in what it tells."""

    encoder: Encoder
    columns: tuple[int, ...]


def competing(sae: SAE, features: Sequence[int], k: int | None = None) -> Competing | None:
    """What clamps of `features` ask; None where each is read by its own row alone.

    `k` takes the place of the SAE's own, or of matching pursuit's number of steps. Raises
    `IncompatibleArtefact` (`no_k`, `feature_out_of_range`), `Unsupported` (`competitive_sae`).
    """
    if k is not None:
        check_k(sae, k)
    sae.check_features(features)
    if not sae.competitive:
        return None
    own = sae.sha256 if k in (None, sae.k) else f"{sae.sha256}/k={k}"
    if sae.pursuit is not None:
        return Competing(_shared(own, lambda: _pursuit(sae, own, k)), tuple(features))
    if sae.k is None:
        raise Unsupported(
            f"features of a {sae.architecture} SAE cannot be clamped: which are active depends on "
            "all of them, in a way that no encoder says. Add to them with mode 'add', or capture "
            "them",
            param="/sae",
            code="competitive_sae",
        )
    if sae.grouped:
        return _groups(sae, features, sae.k)
    ranked = k or sae.k
    return Competing(_shared(own, lambda: _ranking(sae, own, ranked)), (0,) * len(features))


def check_k(sae: SAE, k: int) -> None:
    """Raises `IncompatibleArtefact` (`no_k`) where features cannot be found with this k."""
    if not sae.takes_k:
        raise IncompatibleArtefact(
            f"no number of features is chosen for a token by {sae.card.name!r}, a "
            f"{sae.architecture} SAE: leave 'k' out",
            code="no_k",
        )
    if k > sae.d_sae:
        raise IncompatibleArtefact(
            f"k is {k} and the SAE {sae.card.name!r} has {sae.d_sae} features: give a smaller one",
            code="no_k",
        )


def _ranking(sae: SAE, identity: str, k: int) -> TopKEncoder:
    rows = _shared(f"{sae.sha256}/rows", lambda: _every_row(sae))
    return TopKEncoder(identity, rows, k, signed=sae.signed)


def _groups(sae: SAE, features: Sequence[int], k: int) -> Competing:
    """The groups of `features` alone; `sae` has k of them."""
    size = sae.d_sae // k
    groups = sorted({feature // size for feature in features})
    identity = f"{sae.sha256}/groups/{','.join(map(str, groups))}"

    def make() -> GroupEncoder:
        members = [group * size + n for group in groups for n in range(size)]
        reads = sae.reads(members)
        rows = LatentRows(reads.read, reads.bias, MEASURES[reads.measure])
        return GroupEncoder(identity, rows, size, torch.tensor(groups))

    return Competing(_shared(identity, make), tuple(features))


def _pursuit(sae: SAE, identity: str, k: int | None) -> PursuitEncoder:
    assert sae.pursuit is not None
    return PursuitEncoder(
        identity, sae.decoder.in_memory(), sae.b_dec, sae.pursuit, sae.normalize, k
    )


def _every_row(sae: SAE) -> LatentRows:
    """All rows of the encoder, in half precision where the file has them so."""
    stored = sae.encoder.stored_dtype
    if stored == torch.float32:
        reads = sae.reads(None)
        return LatentRows(reads.read, reads.bias, MEASURES[reads.measure])
    held = sae.encoder.in_memory()
    assert isinstance(held.matrix, torch.Tensor)
    assert held.matrix.dtype in KEPT_DTYPES
    scale, measure = held.scale, MEASURES[sae.measure]
    if measure == COSINE:
        scale = (torch.ones(sae.d_sae) if scale is None else scale) * sae.d_in**0.5
    return LatentRows(held.matrix, sae.read_biases(), measure, scale)


def _shared(identity: str, make: Callable[[], Held]) -> Held:
    """What of this identity is in use, or is made now."""
    found = _held.get(identity)
    if found is None:
        found = _held[identity] = make()
    return cast(Held, found)
