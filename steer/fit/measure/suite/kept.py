"""Results of concepts on disk, so that a run which was stopped goes on where it was."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from steer.errors import SteerError
from steer.fit.measure.suite.result import ConceptResult, ConceptRow


@dataclass(frozen=True)
class KeptResult:
    """Where a concept's result is kept, in a file of its name that tells what was asked for."""

    path: Path | None
    key: str

    @staticmethod
    def of(folder: Path | None, concept: str, asked: Sequence[Any]) -> KeptResult:
        """For what is `asked` of `concept`, as JSON; without a `folder` nothing is kept."""
        key = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()
        return KeptResult(None if folder is None else folder / "concepts" / f"{concept}.json", key)

    def read(self) -> ConceptResult | None:
        """The result, where it is there and of what is asked for now."""
        if self.path is None or not self.path.is_file():
            return None
        try:
            value = json.loads(self.path.read_text("utf-8"))
            if value["key"] != self.key:
                return None
            rows = tuple(ConceptRow.from_json(row) for row in value["rows"])
        except (OSError, ValueError, KeyError, TypeError):
            return None  # half written, or of another version: it is measured again
        return ConceptResult(value["concept"], rows)

    def write(self, found: ConceptResult) -> None:
        """Keeps the result; raises `SteerError` (`not_written`)."""
        if self.path is None:
            return
        rows = [row.as_json() for row in found.rows]
        value = {"key": self.key, "concept": found.concept, "rows": rows}
        text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
        write_whole(self.path, text.encode())


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is there wholly or not at all; raises `SteerError` (`not_written`)."""
    partial = path.with_suffix(".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(data)
        partial.replace(path)
    except OSError as error:
        raise SteerError(
            f"the result {str(path)!r} cannot be written: {error.strerror}", code="not_written"
        ) from error
