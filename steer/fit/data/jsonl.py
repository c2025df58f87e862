"""JSON lines, read one at a time: the file is never in memory, and every error names its line."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

from steer.errors import FileFormatError

_MARK = b"\xef\xbb\xbf"
"""The byte order mark that some editors and spreadsheets put in front of UTF-8."""

Item = TypeVar("Item")


@dataclass(frozen=True)
class DataSet(Generic[Item]):
    """What a file holds, in order, and the hash of the file."""

    items: tuple[Item, ...]
    sha256: str

    def __len__(self) -> int:
        return len(self.items)


@dataclass
class LineReader:
    """Parses the lines of one file; `sha256` is of all its bytes, once they have been read.

    `what` names an item in errors, `shape` shows one, `code` is the errors' stable code.
    """

    path: Path
    what: str
    shape: str
    code: str
    _hash: Any = field(default_factory=hashlib.sha256)

    def read(self, parse: Callable[[Any, str], Item]) -> DataSet[Item]:
        """Every line through `parse`, which takes the JSON value and where it stands.

        Raises `FileFormatError` for a file that cannot be read, holds nothing, or has a bad line.
        """
        try:
            with self.path.open("rb") as file:
                return self.read_lines(file, parse)
        except OSError as error:
            raise FileFormatError(
                f"{str(self.path)!r} cannot be read: {error.strerror or error}",
                code="no_such_file",
            ) from error

    def read_lines(
        self, lines: Iterable[bytes], parse: Callable[[Any, str], Item]
    ) -> DataSet[Item]:
        """Lines that are already here; `path` only names them in errors."""
        items: list[Item] = []
        for number, line in enumerate(lines, start=1):
            self._hash.update(line)
            text = line.removeprefix(_MARK) if number == 1 else line
            if text.strip():
                at = f"{self.path}, line {number}"
                items.append(parse(self._json(text, at, first=not items), at))
        if not items:
            raise FileFormatError(
                f"{str(self.path)!r} holds no {self.what}s: write one {self.shape} per line",
                code=f"no_{self.what.split()[-1]}s",
            )
        return DataSet(tuple(items), self._hash.hexdigest())

    def read_bytes(self, data: bytes, parse: Callable[[Any, str], Item]) -> DataSet[Item]:
        """The lines of `data`."""
        return self.read_lines(io.BytesIO(data), parse)

    def _json(self, line: bytes, at: str, *, first: bool) -> Any:
        try:
            value = json.loads(line.decode(), object_pairs_hook=_no_key_twice)
        except UnicodeDecodeError as error:
            raise FileFormatError(f"{at}: not UTF-8 text: {error}", code=self.code) from error
        except (ValueError, RecursionError) as error:
            why = f"not JSON: {error}"
            if first:
                why += f"; JSON lines are needed, one {self.shape} on each line"
            raise FileFormatError(f"{at}: {why}", code=self.code) from error
        if first and _is_table(value):
            raise FileFormatError(
                f"{at}: a whole JSON array of objects: write each of them on a line of its own, "
                f"as {self.shape}",
                code=self.code,
            )
        return value


def _no_key_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the key {twice!r} stands twice in an object")
    return found


def _is_table(value: Any) -> bool:
    """Whether this is all items of a file in one array; a chat is an array of objects too."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(item, dict) and "role" not in item for item in value)
    )


def sha256_of(values: Sequence[Any]) -> str:
    """The hash of the file that holds `values`, one JSON value per line."""
    found = hashlib.sha256()
    for value in values:
        found.update((json.dumps(value, ensure_ascii=False) + "\n").encode())
    return found.hexdigest()


def check_keys(value: Any, keys: Sequence[str], at: str, what: str, code: str) -> dict[str, Any]:
    """`value` as an object with exactly `keys`; raises `FileFormatError` that lists what it has."""
    if not isinstance(value, dict) or set(value) != set(keys):
        found = sorted(value) if isinstance(value, dict) else type(value).__name__
        named = ", ".join(map(repr, keys[:-1])) + f" and {keys[-1]!r}"
        raise FileFormatError(
            f"{at}: a {what} is an object with exactly the keys {named}; got {found!r}", code=code
        )
    return value
