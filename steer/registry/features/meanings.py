"""What labels mean, as vectors, beside the SAE that they are of.

Each text is kept by its content, so a label that has changed is a new one, and one that comes back
is known. Each embedder has vectors of its own: by its model's name and its width.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors.numpy import load, save

from steer.artefacts.sae.labels import FeatureLabel, FeatureMatch, match_order
from steer.registry.features.findings import BesideFiles

_FOLDER, _SUFFIX = "meanings", ".safetensors"
_DIGEST = 16
SHARD = 4096
"""Texts in one file."""
_HELD_BYTES = 256 << 20


@dataclass(frozen=True)
class EmbedderIdentity:
    """Whose vectors they are: the model's name, and how many numbers each has."""

    model: str
    width: int

    @property
    def folder(self) -> str:
        return hashlib.sha256(f"{self.model}\n{self.width}".encode()).hexdigest()[:32]


@dataclass(frozen=True)
class NearMeanings:
    """The features nearest in meaning, and how many of the `labels` have a vector (`known`)."""

    matches: tuple[FeatureMatch, ...]
    known: int
    labels: int


@dataclass(frozen=True)
class _Shard:
    keys: tuple[bytes, ...]
    rows: NDArray[np.float16]


class MeaningStore:
    """The vectors of labels in a registry's files.

    Rows have length 1 and are kept as float16: a cosine is right to about 1e-3. Files are added,
    never changed, so those who embed the same labels at once only do the same twice.
    """

    def __init__(self, files: BesideFiles) -> None:
        self.files = files
        self._held: OrderedDict[tuple[str, ...], _Shard] = OrderedDict()

    def missing(
        self, sae: str, embedder: EmbedderIdentity, labels: Mapping[int, FeatureLabel]
    ) -> list[str]:
        """The texts of labels that have no vector, each once."""
        known = {key for shard in self._shards(sae, embedder) for key in shard.keys}
        texts = dict.fromkeys(text for _, text in _texts(labels))
        return [text for text in texts if _key(text) not in known]

    def keep(
        self,
        sae: str,
        embedder: EmbedderIdentity,
        texts: Sequence[str],
        rows: NDArray[np.float32],
    ) -> None:
        """Keeps the rows `[texts, width]` of texts, in one file."""
        keys = [_key(text) for text in texts]
        arrays: dict[str, NDArray[Any]] = {
            "keys": np.frombuffer(b"".join(keys), np.uint8).reshape(-1, _DIGEST),
            "rows": np.ascontiguousarray(rows, np.float16),
        }
        data = save(arrays, metadata={"embedder": embedder.model})
        name = hashlib.sha256(b"".join(keys)).hexdigest()[:32] + _SUFFIX
        self.files.write(data, sae, _FOLDER, embedder.folder, name)

    def drop_unused(
        self, sae: str, embedder: EmbedderIdentity, labels: Mapping[int, FeatureLabel]
    ) -> int:
        """Removes the files of which no text is a label's any longer; how many."""
        current = {_key(text) for _, text in _texts(labels)}
        unused = [
            name
            for name, shard in self._named(sae, embedder)
            if not any(key in current for key in shard.keys)
        ]
        for name in unused:
            self.files.remove(sae, _FOLDER, embedder.folder, name)
        return len(unused)

    def nearest(
        self,
        sae: str,
        embedder: EmbedderIdentity,
        labels: Mapping[int, FeatureLabel],
        query: NDArray[np.float32],
        *,
        limit: int,
    ) -> NearMeanings:
        """The features whose labels have the greatest cosine with `query` `[width]`, of length 1,
        best first; equal ones in the order of `match_order`."""
        features: dict[bytes, list[int]] = {}
        for feature, text in _texts(labels):
            features.setdefault(_key(text), []).append(feature)
        count = sum(map(len, features.values()))
        found: dict[int, float] = {}
        for shard in self._shards(sae, embedder):
            # Rounded rows are a little longer or shorter than 1.
            cosines = np.clip(shard.rows.astype(np.float32) @ query, -1.0, 1.0)
            for key, cosine in zip(shard.keys, cosines.tolist(), strict=True):
                found.update(dict.fromkeys(features.get(key, ()), cosine))
        least = min(heapq.nlargest(limit, found.values()), default=0.0)
        matches = [
            FeatureMatch(feature=one, label=labels[one], score=score)
            for one, score in found.items()
            if score >= least
        ]
        matches.sort(key=match_order)
        return NearMeanings(tuple(matches[:limit]), known=len(found), labels=count)

    def _shards(self, sae: str, embedder: EmbedderIdentity) -> Iterator[_Shard]:
        return (shard for _, shard in self._named(sae, embedder))

    def _named(self, sae: str, embedder: EmbedderIdentity) -> Iterable[tuple[str, _Shard]]:
        for name in self.files.names(sae, _FOLDER, embedder.folder):
            shard = self._read((sae, _FOLDER, embedder.folder, name), embedder.width)
            if shard is not None:
                yield name, shard

    def _read(self, path: tuple[str, ...], width: int) -> _Shard | None:
        """A file's rows; None where it is gone or damaged: its texts are then embedded again."""
        if path in self._held:
            self._held.move_to_end(path)
            return self._held[path]
        data = self.files.read(*path)
        if data is None:
            return None
        try:
            arrays = load(data)
            keys, rows = arrays["keys"], arrays["rows"]
        except (SafetensorError, KeyError):
            return None
        if keys.shape != (len(rows), _DIGEST) or rows.shape[1:] != (width,):
            return None
        shard = _Shard(tuple(bytes(row) for row in keys), rows)
        self._held[path] = shard
        while sum(one.rows.nbytes for one in self._held.values()) > _HELD_BYTES:
            self._held.popitem(last=False)
        return shard


def meaning_text(label: FeatureLabel) -> str:
    """What of a label is embedded: its text, or else the attribute that it names."""
    told = (label.attribute or "", label.direction or "")
    return label.text.strip() or ": ".join(part for part in told if part)


def _texts(labels: Mapping[int, FeatureLabel]) -> Iterator[tuple[int, str]]:
    for feature, label in labels.items():
        if text := meaning_text(label):
            yield feature, text


def _key(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()[:_DIGEST]
