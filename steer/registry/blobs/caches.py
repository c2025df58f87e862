"""What a registry keeps in memory: answers of the catalogue, and loaded artefacts."""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")


class AnswerCache(Generic[K, V]):
    """Answers that hold until the catalogue's state number changes.

    Assumes: the state is read before the answer it is kept with.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self._state: int | None = None
        self._answers: dict[K, V] = {}

    def get(self, key: K, state: int, ask: Callable[[], V]) -> V:
        """The answer kept under `key` in this `state`, or that of `ask`, which may raise."""
        with self._lock:
            if state != self._state:
                self._answers.clear()
                self._state = state
            if key in self._answers:
                return self._answers[key]
        answer = ask()
        with self._lock:
            # Another thread may have seen a newer state while this one asked.
            if state == self._state and len(self._answers) < self._limit:
                self._answers[key] = answer
        return answer


class LoadedCache(Generic[K, V]):
    """Loaded objects, the least recently used ones dropped over a number of bytes.

    Guarantees: an object is loaded once, however many threads ask for it at the same time.
    """

    def __init__(self, limit_bytes: int) -> None:
        self._limit = limit_bytes
        self._lock = threading.Lock()
        self._held: OrderedDict[K, tuple[V, int]] = OrderedDict()
        self._bytes = 0
        self._loading: dict[K, threading.Lock] = {}

    def get(self, key: K, size: Callable[[V], int], load: Callable[[], V]) -> V:
        """The object under `key`, made by `load`; `size` says how much memory one takes."""
        found = self._touch(key)
        if found is not None:
            return found
        with self._lock:
            turn = self._loading.setdefault(key, threading.Lock())
        with turn:
            found = self._touch(key)
            if found is not None:
                return found
            try:
                value = load()
                self._keep(key, value, size(value))
            finally:
                with self._lock:
                    self._loading.pop(key, None)
        return value

    def _touch(self, key: K) -> V | None:
        with self._lock:
            held = self._held.get(key)
            if held is None:
                return None
            self._held.move_to_end(key)
            return held[0]

    def _keep(self, key: K, value: V, size: int) -> None:
        with self._lock:
            previous = self._held.pop(key, None)
            self._bytes += size - (previous[1] if previous else 0)
            self._held[key] = (value, size)
            while self._bytes > self._limit and len(self._held) > 1:
                _, (_, dropped) = self._held.popitem(last=False)
                self._bytes -= dropped
