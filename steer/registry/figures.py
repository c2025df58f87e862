"""How much a registry holds, and what was done with it."""

from __future__ import annotations

import threading
from collections import Counter
from dataclasses import dataclass

from steer.registry.blobs.caches import AnswerCache
from steer.registry.catalogue.catalogue import Catalogue
from steer.registry.profiles import stored_profiles


@dataclass(frozen=True)
class RegistryStats:
    """Figures for metrics: bytes of all that has a name and of what can be restored, names by
    kind, operations since it was opened."""

    blob_bytes: int
    removed_bytes: int
    artefacts: dict[str, int]
    profiles: int
    operations: dict[str, int]


class RegistryFigures:
    """Counts operations, and all that is registered, for whatever model. Safe from any thread."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._catalogue = catalogue
        self._totals: AnswerCache[None, tuple[int, int, dict[str, int], int]] = AnswerCache(1)
        self._operations: Counter[str] = Counter()
        self._lock = threading.Lock()

    def count(self, operation: str) -> None:
        """One more `operation`."""
        with self._lock:
            self._operations[operation] += 1

    def stats(self) -> RegistryStats:
        """The figures at this moment."""
        blob_bytes, removed_bytes, artefacts, profiles = self._totals.get(
            None, self._catalogue.state(), self._count_all
        )
        with self._lock:
            operations = dict(self._operations)
        return RegistryStats(blob_bytes, removed_bytes, dict(artefacts), profiles, operations)

    def _count_all(self) -> tuple[int, int, dict[str, int], int]:
        with self._catalogue.reading() as connection:
            blob_bytes, removed_bytes = self._catalogue.totals(connection)
            counts = self._catalogue.counts(connection)
            return blob_bytes, removed_bytes, counts, len(stored_profiles(connection))
