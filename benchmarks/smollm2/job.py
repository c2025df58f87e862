"""What everybody is asked: the same chats, the same number of tokens, and the same additions."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Chat = list[dict[str, str]]
Edit = dict[int, list[float]]
"""What is added to the output of each layer, for every token."""


@dataclass(frozen=True)
class Job:
    """Chat n is steered by spec n modulo their number; `edits` are the specs once more, as numbers.

    `vector` is the first spec as a file for llama.cpp, which steers everybody with it, and its
    scale. `ends` are the tokens that end an answer.
    """

    model: str
    dtype: str
    tokens: int
    chats: list[Chat]
    prompts: list[list[int]]
    specs: list[dict[str, Any]]
    edits: list[Edit]
    registry: str
    vector: tuple[str, float]
    ends: list[int]

    def write(self, path: Path) -> Path:
        """For processes of other environments."""
        path.write_text(json.dumps(asdict(self)))
        return path


def read(path: str | Path) -> Job:
    given = json.loads(Path(path).read_text())
    edits = [{int(layer): row for layer, row in one.items()} for one in given.pop("edits")]
    return Job(**given, edits=edits)
