"""One piece of work with a model that is asked over HTTP: what it cost, and what it has said."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from steer.errors import StorageError


class AskedUsage(BaseModel):
    """What asking has cost: `calls` that were answered, and tokens as the model's server counts
    them (0 where it does not say)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


@dataclass
class AskedWork:
    """What was asked in one piece of work. Answers that could be read are written down in the file
    `path`, where there is one, and are not asked for again. May be used from several threads."""

    path: Path | None = None
    progress: Callable[[int], None] | None = None
    _told: int = 0
    _usage: AskedUsage = field(default_factory=AskedUsage)
    _known: dict[str, str] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __post_init__(self) -> None:
        if self.path is None or not self.path.is_file():
            return
        for line in self.path.read_text("utf-8").splitlines():
            try:
                key, said = json.loads(line)
            except ValueError:
                continue  # cut off by a crash
            self._known[key] = said

    @property
    def usage(self) -> AskedUsage:
        with self._lock:
            return self._usage

    def tell(self, questions: int) -> None:
        """Tells `progress` of questions that are settled."""
        self._told += questions
        if self.progress is not None and questions > 0:
            self.progress(questions)

    def finish(self, questions: int) -> None:
        """As `tell`, of those among so many that there was nothing to ask for."""
        self.tell(questions - self._told)

    def count(self, answer: Any) -> None:
        """Counts a call with its `answer`, a chat completion."""
        used = getattr(answer, "usage", None)
        with self._lock:
            self._usage = AskedUsage(
                calls=self._usage.calls + 1,
                prompt_tokens=self._usage.prompt_tokens + (getattr(used, "prompt_tokens", 0) or 0),
                completion_tokens=self._usage.completion_tokens
                + (getattr(used, "completion_tokens", 0) or 0),
            )

    def known(self, model: str, question: str) -> str | None:
        """What the model said to the question before; None where it was not asked."""
        with self._lock:
            return self._known.get(_key(model, question))

    def note(self, model: str, question: str, said: str) -> None:
        """Writes an answer down. Raises `StorageError`."""
        key = _key(model, question)
        with self._lock:
            self._known[key] = said
            if self.path is None:
                return
            try:
                with self.path.open("a", encoding="utf-8") as file:
                    # The line's end comes first: what a crash cut off spoils no line after it.
                    file.write("\n" + json.dumps([key, said]))
            except OSError as error:
                raise StorageError(
                    f"what a model was asked cannot be kept in {self.path.name!r}: "
                    f"{error.strerror}; make room on the disk, or let it be written"
                ) from error


def _key(model: str, question: str) -> str:
    return hashlib.sha256(f"{model}\n{question}".encode()).hexdigest()[:32]
